// node run.mjs [seconds]: times the models of this folder and writes results.json beside them.
//
// Needs Node 18 or newer and one of onnxruntime-node, onnxruntime-web:  npm install onnxruntime-node

import { createRequire } from "node:module";
import { readFile, rename, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { measure, result } from "./kit.mjs";

const folder = path.dirname(fileURLToPath(import.meta.url));
const plan = JSON.parse(await readFile(path.join(folder, "plan.json"), "utf8"));
const seconds = Number(process.argv[2] ?? plan.seconds);
if (!(seconds > 0)) throw new Error(`Seconds are a positive number, and not ${process.argv[2]}.`);

// Looked for here, and where the command was given.
async function find() {
  for (const name of ["onnxruntime-node", "onnxruntime-web"]) {
    for (const place of [folder, process.cwd()]) {
      try {
        const require = createRequire(path.join(place, "package.json"));
        const module = require(name);
        // Its package.json may not be exported; the runtime tells its own version.
        const versions = module.env?.versions ?? {};
        const said = versions.node ?? versions.web ?? versions.common ?? "";
        return { ort: module.default ?? module, name, said };
      } catch (error) {
        if (error.code !== "MODULE_NOT_FOUND") console.error(`${name} cannot be loaded: ${error.message}`);
      }
    }
  }
  throw new Error("Neither onnxruntime-node nor onnxruntime-web is installed: npm install onnxruntime-node");
}

const { ort, name, said } = await find();
const web = name === "onnxruntime-web";
if (web) ort.env.wasm.numThreads = 1;
const provider = web && plan.short === "cpu" ? "wasm" : plan.short;
const source = async (file) => {
  const at = path.join(folder, file);
  return web ? new Uint8Array(await readFile(at)) : at;
};
const show = (words) => process.stderr.isTTY && process.stderr.write(`\r\x1b[K${words}`);
const found = await measure(ort, plan, provider, source, seconds, show);
show("");
const cpus = os.cpus();
const machine = { processor: cpus[0]?.model?.trim() || os.arch(), architecture: web ? "wasm" : os.arch(), cores: cpus.length };
const target = path.join(folder, "results.json");
await writeFile(`${target}.new`, result(plan, { runtime: `${name} ${said}`.trim(), machine, ...found }));
await rename(`${target}.new`, target);
console.log(`${target}: ${Math.round(found.seconds)} s on ${machine.processor}`);
