package example

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import kotlin.math.abs
import kotlin.math.max

/** A tensor of the sample: raw little-endian numbers in a file. */
class Tensor(val name: String, val type: OnnxJavaType, val shape: LongArray, val file: String)

val INPUTS = listOf(
@@{inputs}
)
val OUTPUTS = listOf(
@@{outputs}
)
val FILES = listOf(@@{files})
const val MODEL = "model.onnx"

/** Largest difference, as a share of the largest number. */
const val TOLERANCE = @@{tolerance}

/** @@{provider}. */
fun sessionOptions(): OrtSession.SessionOptions {
    val options = OrtSession.SessionOptions()
@@{code}    return options
}

class Result(val difference: Double, val milliseconds: Double, val first: Map<String, List<Double>>) {
    val good get() = difference <= TOLERANCE

    override fun toString() =
        (if (good) "ok" else "error") + ": difference $difference, allowed $TOLERANCE; $milliseconds ms a run\n" +
            first.entries.joinToString("\n") { (name, numbers) -> "$name: $numbers" }
}

/** Runs the model of one folder on the sample of another. */
fun runSample(model: File, sample: File): Result {
    val environment = OrtEnvironment.getEnvironment()
    val session = environment.createSession(File(model, MODEL).path, sessionOptions())
    val feeds = INPUTS.associate { it.name to load(environment, it, sample) }
    session.run(feeds).close() // the first run also prepares
    val start = System.nanoTime()
    val results = session.run(feeds)
    val milliseconds = (System.nanoTime() - start) / 1e6
    var difference = 0.0
    val first = LinkedHashMap<String, List<Double>>()
    for (output in OUTPUTS) {
        val found = results.get(output.name).get() as OnnxTensor
        val expected = load(environment, output, sample)
        val same = found.info.shape.contentEquals(output.shape)
        val values = numbers(found)
        difference = max(difference, if (same) far(numbers(expected), values) else Double.POSITIVE_INFINITY)
        first[output.name] = values.take(8)
        expected.close()
    }
    feeds.values.forEach { it.close() }
    results.close()
    session.close()
    return Result(difference, milliseconds, first)
}

private fun load(environment: OrtEnvironment, tensor: Tensor, folder: File): OnnxTensor {
    val bytes = File(folder, tensor.file).readBytes()
    val buffer = ByteBuffer.allocateDirect(bytes.size).order(ByteOrder.nativeOrder())
    buffer.put(bytes)
    buffer.rewind()
    return OnnxTensor.createTensor(environment, buffer, tensor.shape, tensor.type)
}

private fun numbers(tensor: OnnxTensor): DoubleArray = when (tensor.info.type) {
    OnnxJavaType.FLOAT, OnnxJavaType.FLOAT16 -> tensor.floatBuffer.let { b -> DoubleArray(b.remaining()) { b[it].toDouble() } }
    OnnxJavaType.DOUBLE -> tensor.doubleBuffer.let { b -> DoubleArray(b.remaining()) { b[it] } }
    OnnxJavaType.INT64 -> tensor.longBuffer.let { b -> DoubleArray(b.remaining()) { b[it].toDouble() } }
    OnnxJavaType.INT32 -> tensor.intBuffer.let { b -> DoubleArray(b.remaining()) { b[it].toDouble() } }
    OnnxJavaType.INT16 -> tensor.shortBuffer.let { b -> DoubleArray(b.remaining()) { b[it].toDouble() } }
    OnnxJavaType.UINT8 -> tensor.byteBuffer.let { b -> DoubleArray(b.remaining()) { (b[it].toInt() and 255).toDouble() } }
    else -> tensor.byteBuffer.let { b -> DoubleArray(b.remaining()) { b[it].toDouble() } }
}

private fun far(expected: DoubleArray, found: DoubleArray): Double {
    var worst = 0.0
    var largest = 0.0
    for (i in expected.indices) {
        val distance = if (expected[i].equals(found[i])) 0.0 else abs(expected[i] - found[i])
        worst = max(worst, if (distance.isNaN()) Double.POSITIVE_INFINITY else distance)
        if (expected[i].isFinite()) largest = max(largest, abs(expected[i]))
    }
    return worst / (if (largest == 0.0) 1.0 else largest)
}
