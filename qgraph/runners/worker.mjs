// Runs a model with onnxruntime-web in Node: node worker.mjs FOLDER.
//
// FOLDER holds job.json and inputs.bin; result.json and outputs.bin are written beside them (forms: see base.py).
// Besides the fields all runners know, the job has `modules` (a node_modules folder that holds onnxruntime-web),
// `backend` (what that package calls the provider) and `external` ({path, file}: where external data lies).

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const ALIGNMENT = 16;
const CHUNK = 1 << 30; // Node reads less than 2 GiB at once.
const MEMORY = 4096; // MiB that 32-bit WebAssembly can address.
const LEVELS = { none: "disabled", basic: "basic", all: "all" };
const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  float16: Uint16Array,
  int8: Int8Array,
  int16: Int16Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
};

// What the runtime prints is kept: its profile comes that way, and so do the reasons of its errors.
const said = [];
for (const way of ["log", "info", "warn", "error", "debug"]) {
  console[way] = (...words) => said.push(words.join(" "));
}
const write = fs.writeSync; // Newer builds write to standard output by themselves.
fs.writeSync = (file, ...rest) =>
  (file === 1 || file === 2) && typeof rest[0] === "string" ? said.push(rest[0].trimEnd()) : write(file, ...rest);

// The instance is kept too. Older builds throw C++ exceptions as bare addresses, which only its memory explains.
const kept = { memory: null, table: null };
const instantiate = WebAssembly.instantiate;
WebAssembly.instantiate = async (source, imports) => {
  const made = await instantiate(source, imports);
  const given = Object.values(imports ?? {}).flatMap((group) => Object.values(group));
  for (const one of [...given, ...Object.values((made.instance ?? made).exports)]) {
    if (one instanceof WebAssembly.Memory) kept.memory = one;
    if (one instanceof WebAssembly.Table) kept.table = one;
  }
  return made;
};

/** What `std::exception::what()` says: third of the virtual functions in the Itanium C++ ABI. */
function what(address) {
  try {
    const words = () => new DataView(kept.memory.buffer);
    const method = words().getUint32(words().getUint32(address, true) + 8, true);
    const start = kept.table.get(method)(address) >>> 0;
    // A copy: a decoder takes no view of shared memory.
    const bytes = new Uint8Array(kept.memory.buffer).slice(start, start + 4096);
    const end = bytes.indexOf(0);
    return new TextDecoder().decode(bytes.subarray(0, end < 0 ? bytes.length : end));
  } catch {
    return "";
  }
}

/** An error in words, without addresses and the paths of the machine that built the runtime. */
function explain(error, bytes) {
  const number = typeof error === "number";
  let text = number ? what(error) : String(error?.message ?? error);
  const size = `${Math.ceil(bytes / 2 ** 20)} MiB`;
  if (/bad_alloc|failed to allocate|out of memory|OOM|Array buffer allocation|bad memory|Invalid typed array/i.test(text)) {
    return `the model (${size}) does not fit: WebAssembly has ${MEMORY} MiB of memory for it and all that it computes`;
  }
  if (!text) {
    const last = said.map(plain).filter(Boolean).slice(-2).join("; ");
    text = last || `the runtime threw ${number ? "a C++ exception" : "an error"} without words`;
  }
  return plain(text.replace(/^.*ERROR_MESSAGE: /s, ""));
}

/** Without colours, and with what C++ puts before its words (path of the source, signature of the function) cut. */
function plain(text) {
  const line = text.replace(/\x1b\[[0-9;]*m/g, "").replace(/\s+/g, " ").trim();
  const place = line.match(/\S*?[\w-]+\.(?:cc|h|hpp|cpp):\d+ /);
  if (!place) return line;
  const before = line.slice(0, place.index);
  const after = line.slice(place.index + place[0].length);
  let end = after.indexOf("(");
  if (end < 0 || !after.slice(0, end).includes("::")) return before + after;
  for (let depth = 0; end < after.length; end++) {
    if (after[end] === "(") depth++;
    if (after[end] === ")" && --depth === 0) break;
  }
  return (before + after.slice(end + 1).replace(/^( const| \[[^\]]*\])+/, "").trimStart()).trim() || line;
}

function read(file) {
  const size = fs.statSync(file).size;
  const data = new Uint8Array(size);
  const handle = fs.openSync(file);
  try {
    for (let at = 0; at < size; ) {
      const got = fs.readSync(handle, data, at, Math.min(CHUNK, size - at), at);
      if (got === 0) throw new Error(`${file} ends at byte ${at} of ${size}`);
      at += got;
    }
  } finally {
    fs.closeSync(handle);
  }
  return data;
}

function tensor(ort, inputs, { name, dtype, shape, offset, bytes }) {
  const Kind = ARRAYS[dtype];
  if (!Kind) throw new Error(`input ${name}: onnxruntime-web takes no ${dtype}`);
  const data = new Kind(inputs.slice(offset, offset + bytes));
  try {
    return new ort.Tensor(dtype, data, shape);
  } catch (error) {
    // Where JavaScript has float16 itself, newer versions may want that.
    if (dtype !== "float16" || !globalThis.Float16Array) throw error;
    return new ort.Tensor(dtype, new globalThis.Float16Array(data.buffer), shape);
  }
}

/** Append raw values to outputs.bin and say where they are. */
function put(file, at, name, found) {
  if (!ARRAYS[found.type]) throw new Error(`output ${name}: values of type ${found.type} cannot be handed over`);
  const { buffer, byteOffset, byteLength } = found.data;
  const offset = Math.ceil(at.end / ALIGNMENT) * ALIGNMENT;
  fs.writeSync(file, new Uint8Array(buffer, byteOffset, byteLength), 0, byteLength, offset);
  at.end = offset + byteLength;
  return { name, dtype: found.type, shape: [...found.dims], offset, bytes: byteLength };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Kernel events of the profile that the runtime printed: median for each node, in order of first execution. */
function kernels(printed) {
  const start = printed.findIndex((line) => line.trimStart().startsWith("["));
  const nodes = new Map();
  for (const event of JSON.parse(printed.slice(start).join("\n"))) {
    if (event.cat !== "Node" || !event.name.endsWith("_kernel_time")) continue;
    const [name, op, provider] = [event.name.slice(0, -12), event.args.op_name, event.args.provider];
    const key = JSON.stringify([name, op, provider]);
    if (!nodes.has(key)) nodes.set(key, { name, op, provider, times: [] });
    nodes.get(key).times.push(event.dur * 1e-6);
  }
  return [...nodes.values()].map(({ times, ...node }) => ({ ...node, seconds: median(times) }));
}

async function run(ort, job, folder, model) {
  ort.env.wasm.numThreads = job.threads || 1;
  const extra = { ...job.config };
  if (job.strict) extra["session.disable_cpu_ep_fallback"] = "1";
  const options = {
    executionProviders: [{ name: job.backend, ...job.provider_options }],
    graphOptimizationLevel: LEVELS[job.level ?? "all"],
    enableProfiling: true,
    logSeverityLevel: 3,
    extra,
  };
  if (job.external?.length) {
    options.externalData = job.external.map((one) => ({ path: one.path, data: read(one.file) }));
  }
  const session = await ort.InferenceSession.create(model, options);
  const inputs = read(path.join(folder, "inputs.bin")).buffer;
  const file = fs.openSync(path.join(folder, "outputs.bin"), "w");
  const at = { end: 0 };
  const outputs = [];
  for (const sample of job.samples) {
    const feeds = Object.fromEntries(sample.map((one) => [one.name, tensor(ort, inputs, one)]));
    const found = await session.run(feeds);
    outputs.push(session.outputNames.map((name) => put(file, at, name, found[name])));
  }
  fs.closeSync(file);
  const mark = said.length;
  await session.endProfiling();
  return { outputs, kernels: kernels(said.slice(mark)), assigned: {} };
}

const folder = process.argv[2];
const job = JSON.parse(fs.readFileSync(path.join(folder, "job.json"), "utf8"));
let result = { runtime: "onnxruntime-web" };
let bytes = 0;
try {
  const require = createRequire(path.join(job.modules, "worker.cjs"));
  const place = path.join(job.modules, "onnxruntime-web", "package.json");
  result.runtime += ` ${JSON.parse(fs.readFileSync(place, "utf8")).version} (${job.backend})`;
  const ort = require("onnxruntime-web");
  for (const file of [job.model, ...(job.external ?? []).map((one) => one.file)]) bytes += fs.statSync(file).size;
  Object.assign(result, await run(ort, job, folder, read(job.model)));
} catch (error) {
  result.error = explain(error, bytes);
}
fs.writeFileSync(path.join(folder, "result.json"), JSON.stringify(result));
process.exit(0); // Threads of the runtime would keep us.
