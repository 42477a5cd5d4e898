// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "ModelRunner",
    platforms: [.iOS(.v15), .macOS(.v13)],
    products: [.library(name: "ModelRunner", targets: ["ModelRunner"])],
    dependencies: [.package(url: @@{package}, exact: @@{version})],
    targets: [
        .target(
            name: "ModelRunner",
            dependencies: [.product(name: "onnxruntime", package: "onnxruntime-swift-package-manager")]),
        .executableTarget(name: "Example", dependencies: ["ModelRunner"]),
    ]
)
