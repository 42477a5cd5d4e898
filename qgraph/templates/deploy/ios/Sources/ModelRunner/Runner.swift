import Foundation
import OnnxRuntimeBindings

/// A tensor of the sample: raw little-endian numbers in a file.
struct Tensor {
    let name: String
    let type: ORTTensorElementDataType
    let shape: [Int]
    let file: String
}

let inputs: [Tensor] = [
@@{inputs}
]
let outputs: [Tensor] = [
@@{outputs}
]

/// Largest difference, as a share of the largest number.
public let tolerance = @@{tolerance}

/// @@{provider}.
func sessionOptions() throws -> ORTSessionOptions {
    let options = try ORTSessionOptions()
@@{code}    return options
}

public struct Result: CustomStringConvertible {
    public let difference: Double
    public let milliseconds: Double
    public let first: [String: [Double]]
    public var good: Bool { difference <= tolerance }
    public var description: String {
        "\(good ? "ok" : "error"): difference \(difference), allowed \(tolerance); \(milliseconds) ms a run\n"
            + first.map { "\($0.key): \($0.value)" }.sorted().joined(separator: "\n")
    }
}

/// Runs the model of one folder on the sample of another.
public func runSample(model: URL, sample: URL) throws -> Result {
    let environment = try ORTEnv(loggingLevel: .warning)
    let path = model.appendingPathComponent("model.onnx").path
    let session = try ORTSession(env: environment, modelPath: path, sessionOptions: try sessionOptions())
    var feeds: [String: ORTValue] = [:]
    for input in inputs {
        let data = NSMutableData(data: try Data(contentsOf: sample.appendingPathComponent(input.file)))
        feeds[input.name] = try ORTValue(
            tensorData: data, elementType: input.type, shape: input.shape.map { NSNumber(value: $0) })
    }
    let names = Set(outputs.map { $0.name })
    _ = try session.run(withInputs: feeds, outputNames: names, runOptions: nil) // the first run also prepares
    let start = Date()
    let results = try session.run(withInputs: feeds, outputNames: names, runOptions: nil)
    let milliseconds = Date().timeIntervalSince(start) * 1000
    var difference = 0.0
    var first: [String: [Double]] = [:]
    for output in outputs {
        guard let found = results[output.name] else { continue }
        let shape = try found.tensorTypeAndShapeInfo().shape.map { $0.intValue }
        let values = numbers(try found.tensorData() as Data, output.type)
        let expected = numbers(try Data(contentsOf: sample.appendingPathComponent(output.file)), output.type)
        difference = max(difference, shape == output.shape ? far(expected, values) : .infinity)
        first[output.name] = Array(values.prefix(8))
    }
    return Result(difference: difference, milliseconds: milliseconds, first: first)
}

func numbers(_ data: Data, _ type: ORTTensorElementDataType) -> [Double] {
    func read<T>(_: T.Type, _ number: (T) -> Double) -> [Double] {
        data.withUnsafeBytes { bytes in
            (0..<bytes.count / MemoryLayout<T>.size).map {
                number(bytes.loadUnaligned(fromByteOffset: $0 * MemoryLayout<T>.size, as: T.self))
            }
        }
    }
    switch type {
    case .float: return read(Float.self) { Double($0) }
    case .int8: return read(Int8.self) { Double($0) }
    case .uint8: return read(UInt8.self) { Double($0) }
    case .int32: return read(Int32.self) { Double($0) }
    case .uint32: return read(UInt32.self) { Double($0) }
    case .int64: return read(Int64.self) { Double($0) }
    case .uint64: return read(UInt64.self) { Double($0) }
    default: return []
    }
}

func far(_ expected: [Double], _ found: [Double]) -> Double {
    guard expected.count == found.count else { return .infinity }
    var worst = 0.0
    var largest = 0.0
    for (a, b) in zip(expected, found) {
        let distance = a == b || (a.isNaN && b.isNaN) ? 0 : abs(a - b)
        worst = max(worst, distance.isNaN ? .infinity : distance)
        if a.isFinite { largest = max(largest, abs(a)) }
    }
    return worst / (largest == 0 ? 1 : largest)
}
