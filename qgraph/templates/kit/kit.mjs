// Times the models of plan.json with any onnxruntime for JavaScript: run.mjs (Node) and index.html (a browser) use it.
//
// Models are timed in rounds. Each round loads every model once, runs it for a moment and frees it, so that one session
// is alive at a time and a drift of the machine's speed meets all alike. Seconds of a run, for each round.

const LEAST_ROUNDS = 3;
const SLICE = 0.05;
// Clocks of browsers are coarse: so many runs are timed together that they last at least this long.
const BATCH = 0.01;

const now = () => performance.now() / 1e3;

function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function feeds(ort, inputs) {
  const found = {};
  for (const { name, type, shape } of inputs) {
    const count = shape.reduce((a, b) => a * b, 1);
    const make = { float32: Float32Array, uint8: Uint8Array, int8: Int8Array }[type];
    const data = new make(count);
    for (let i = 0; i < count; i++) {
      const step = (i * 37) % 251;
      data[i] = type === "float32" ? step / 251 : type === "uint8" ? step : step - 125;
    }
    found[name] = new ort.Tensor(type, data, shape);
  }
  return found;
}

async function block(ort, source, inputs, options) {
  const session = await ort.InferenceSession.create(source, options);
  try {
    const given = feeds(ort, inputs);
    // Written into the same tensors at each run: making new ones would be a part of each time.
    const kept = await session.run(given);
    const run = async (times) => {
      const start = now();
      for (let i = 0; i < times; i++) await session.run(given, kept);
      return now() - start;
    };
    await run(1);
    const one = Math.max(await run(1), 1e-7);
    const batch = Math.max(1, Math.min(10000, Math.ceil(BATCH / one)));
    const seen = [];
    const end = now() + SLICE;
    while (seen.length < 3 || now() < end) seen.push((await run(batch)) / batch);
    return median(seen);
  } finally {
    await session.release?.();
  }
}

// `source(file)` gives what InferenceSession.create takes; `progress(words)` is told what is done.
export async function measure(ort, plan, provider, source, seconds, progress) {
  const options = {
    executionProviders: [provider],
    graphOptimizationLevel: "all",
    intraOpNumThreads: 1,
    interOpNumThreads: 1,
    logSeverityLevel: 4,
  };
  const times = Object.fromEntries(plan.models.map(({ name }) => [name, []]));
  const start = now();
  let rounds = 0;
  while (rounds < LEAST_ROUNDS || (now() - start) * (1 + 1 / rounds) < seconds) {
    const order = rounds % 2 ? [...plan.models].reverse() : plan.models;
    for (const [at, { name, file, inputs }] of order.entries()) {
      if (times[name].error) continue;
      progress(`round ${rounds + 1}, model ${at + 1} of ${plan.models.length}, ${Math.round(now() - start)} s: ${name}`);
      try {
        times[name].push(await block(ort, await source(file), inputs, options));
      } catch (error) {
        times[name] = { error: String(error.message ?? error).slice(0, 300) };
      }
    }
    rounds++;
  }
  return { times, seconds: now() - start };
}

export function result(plan, told) {
  const { version, table, like, provider } = plan;
  return JSON.stringify({ version, table, like, provider, date: new Date().toISOString().slice(0, 10), ...told }, null, 1);
}
