"""Which provider runs on which platform, with which options and packages: data that the examples are filled with."""

from __future__ import annotations

import dataclasses

__all__ = ["PLATFORMS", "Provider", "provider_on"]

PLATFORMS = ("android", "ios", "web")
"""What an example can be written for."""


@dataclasses.dataclass(frozen=True)
class Provider:
    """An execution provider as one platform's package has it.

    Attributes:
        name: in the runtime's words.
        options: its options; empty where the runtime's defaults are right.
        package: what the application depends on.
        version: of that package.
        code: lines that add it to session options, in the platform's language; JavaScript has the list of names.
    """

    name: str
    options: dict[str, str]
    package: str
    version: str
    code: tuple[str, ...] = ()


_ANDROID, _QNN = "com.microsoft.onnxruntime:onnxruntime-android", "com.microsoft.onnxruntime:onnxruntime-android-qnn"
_IOS = "https://github.com/microsoft/onnxruntime-swift-package-manager"
_WEB = "onnxruntime-web"
_ANDROID_VERSION, _IOS_VERSION, _WEB_VERSION = "1.24.3", "1.24.2", "1.30.0"

# The first of a platform is what it falls back on. XNNPACK has a thread pool of its own, beside which the runtime's
# should neither be large nor spin.
_KNOWN: dict[str, tuple[Provider, ...]] = {
    "android": (
        Provider("CPUExecutionProvider", {}, _ANDROID, _ANDROID_VERSION),
        Provider(
            "XnnpackExecutionProvider",
            {"intra_op_num_threads": "all cores"},
            _ANDROID,
            _ANDROID_VERSION,
            (
                'options.addConfigEntry("session.intra_op.allow_spinning", "0")',
                "options.setIntraOpNumThreads(1)",
                'options.addXnnpack(mapOf("intra_op_num_threads" to "${Runtime.getRuntime().availableProcessors()}"))',
            ),
        ),
        Provider("NnapiExecutionProvider", {}, _ANDROID, _ANDROID_VERSION, ("options.addNnapi()",)),
        Provider(
            "QNNExecutionProvider",
            {"backend_path": "libQnnHtp.so", "htp_performance_mode": "burst"},
            _QNN,
            _ANDROID_VERSION,
            ('options.addQnn(mapOf("backend_path" to "libQnnHtp.so", "htp_performance_mode" to "burst"))',),
        ),
    ),
    "ios": (
        Provider("CPUExecutionProvider", {}, _IOS, _IOS_VERSION),
        Provider(
            "XnnpackExecutionProvider",
            {"intra_op_num_threads": "all cores"},
            _IOS,
            _IOS_VERSION,
            (
                "let xnnpack = ORTXnnpackExecutionProviderOptions()",
                "xnnpack.intra_op_num_threads = Int32(ProcessInfo.processInfo.activeProcessorCount)",
                'try options.addConfigEntry(withKey: "session.intra_op.allow_spinning", value: "0")',
                "try options.setIntraOpNumThreads(1)",
                "try options.appendXnnpackExecutionProvider(with: xnnpack)",
            ),
        ),
        Provider(
            "CoreMLExecutionProvider",
            {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"},
            _IOS,
            _IOS_VERSION,
            (
                "try options.appendCoreMLExecutionProvider(",
                '    withOptionsV2: ["ModelFormat": "MLProgram", "MLComputeUnits": "ALL"])',
            ),
        ),
    ),
    "web": (
        Provider("wasm", {}, _WEB, _WEB_VERSION, ('"wasm"',)),
        Provider("WebGpuExecutionProvider", {}, _WEB, _WEB_VERSION, ('"webgpu"', '"wasm"')),
    ),
}


def provider_on(platform: str, wanted: str) -> Provider:
    """The provider called `wanted` as `platform` has it, or that platform's CPU where it has none of that name."""
    known = _KNOWN[platform]
    return next((one for one in known if one.name.lower() == wanted.lower()), known[0])
