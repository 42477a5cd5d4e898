package example

import android.app.Activity
import android.os.Bundle
import android.widget.TextView
import java.io.File
import kotlin.concurrent.thread

/** Runs the sample on the device and shows whether the result is the expected one. */
class MainActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val view = TextView(this).apply { text = "Running ..."; textSize = 18f; setPadding(48, 96, 48, 48) }
        setContentView(view)
        thread {
            val words = try {
                unpack()
                runSample(filesDir, filesDir).toString()
            } catch (error: Exception) {
                "error: ${error.message}"
            }
            runOnUiThread { view.text = words }
        }
    }

    /** Assets as files: the runtime maps a model from a path, where bytes would be in memory twice. */
    private fun unpack() {
        for (name in FILES) {
            assets.open(name).use { from -> File(filesDir, name).outputStream().use { from.copyTo(it) } }
        }
    }
}
