// Loads @@{title} with onnxruntime-web, runs the sample, shows the result. See ../README.md.
import { show, showTensor } from "./show.js";

const MODEL = @@{model};
const EXTERNAL = @@{external};
const PROVIDERS = [@@{providers}];
const INPUTS = @@{inputs};
const OUTPUTS = @@{outputs};
const TOLERANCE = @@{tolerance}; // largest difference, as a share of the largest number

const FILE = @@{file};
const VERSION = @@{version};
// A copy in ort/ goes before the one on the net, so that the page works offline.
const RUNTIMES = [`./ort/${FILE}`, `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/${FILE}`];

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array,
  bool: Uint8Array, float16: globalThis.Float16Array ?? Uint16Array,
};

async function bytes(path) {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`cannot load ${path}: ${answer.status}`);
  return answer.arrayBuffer();
}

async function runtime() {
  let last;
  for (const path of RUNTIMES) {
    try {
      return await import(path);
    } catch (error) {
      last = error;
    }
  }
  throw last;
}

/** Halves as numbers, where the browser has no array of them. */
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, part = bits & 1023;
  if (exponent === 31) return part ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : (2 ** -14 * part) / 1024);
}

const numbers = (type, data) =>
  Float64Array.from(data, type === "float16" && data instanceof Uint16Array ? half : Number);

/** Largest difference, as a share of the largest expected number. */
function difference(expected, found) {
  if (expected.length !== found.length) return Infinity;
  let worst = 0, largest = 0;
  expected.forEach((x, i) => {
    const far = Object.is(x, found[i]) ? 0 : Math.abs(x - found[i]);
    worst = Math.max(worst, Number.isNaN(far) ? Infinity : far);
    if (Number.isFinite(x)) largest = Math.max(largest, Math.abs(x));
  });
  return worst / (largest || 1);
}

async function main() {
  const ort = await runtime();
  // The runtime goes on to the next provider without a word; the page says which it is.
  const lost = PROVIDERS[0] === "webgpu" && !(await navigator.gpu?.requestAdapter());
  const executionProviders = lost ? PROVIDERS.slice(1) : PROVIDERS;
  const started = performance.now();
  const externalData = await Promise.all(
    EXTERNAL.map(async (path) => ({ path, data: new Uint8Array(await bytes(`../model/${path}`)) })));
  const model = new Uint8Array(await bytes(MODEL));
  const session = await ort.InferenceSession.create(model, { executionProviders, externalData });
  const loaded = performance.now() - started;

  const feeds = {};
  for (const { name, type, shape, file } of INPUTS) {
    const data = new ARRAYS[type](await bytes(`../${file}`));
    feeds[name] = new ort.Tensor(type, data, shape);
    showTensor("inputs", { name, type, shape, values: numbers(type, data) });
  }

  let results = await session.run(feeds); // the first run also prepares
  const times = [];
  for (let i = 0; i < 9; i++) {
    const before = performance.now();
    results = await session.run(feeds);
    times.push(performance.now() - before);
  }
  times.sort((a, b) => a - b);

  let worst = 0;
  for (const { name, type, shape, file } of OUTPUTS) {
    const expected = numbers(type, new ARRAYS[type](await bytes(`../${file}`)));
    const values = numbers(type, results[name].data);
    const same = results[name].dims.join() === shape.join();
    worst = Math.max(worst, same ? difference(expected, values) : Infinity);
    showTensor("outputs", { name, type, shape: results[name].dims, values, expected });
  }
  const good = worst <= TOLERANCE;
  const where = ort.env.versions.web ?? ort.env.versions.common;
  show(good ? "ok" : "error", good ? "The result is the expected one." : "The result is not the expected one.", {
    "difference, of the largest number": worst === 0 ? "0" : worst.toExponential(1),
    "allowed": TOLERANCE.toExponential(0),
    "a run, median of 9": `${times[4].toFixed(2)} ms`,
    "fetch and load": `${loaded.toFixed(0)} ms`,
    "model": `${(model.byteLength / 1e3).toFixed(0)} kB`,
    [lost ? "onnxruntime-web; no WebGPU here" : "onnxruntime-web"]: `${where}, ${executionProviders[0]}`,
  });
}

document.getElementById("name").textContent = @@{name};
main().catch((error) => show("error", String(error?.message ?? error), {}));
