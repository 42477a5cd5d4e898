// On a Mac: `swift run Example ..` runs the model of the folder above on its sample. An app for iOS has the folders
// `model` and `sample` as resources and calls the same function with their URLs.
import Foundation
import ModelRunner

let folder = URL(fileURLWithPath: CommandLine.arguments.dropFirst().first ?? "..")
do {
    let result = try runSample(
        model: folder.appendingPathComponent("model"), sample: folder.appendingPathComponent("sample"))
    print(result)
    exit(result.good ? 0 : 1)
} catch {
    print("error: \(error)")
    exit(1)
}
