// Draws tensors and the verdict. Nothing here knows the model.

const MOST_ROWS = 10;

function element(parent, tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

/** The verdict: document.title begins with "ok" or "error", and #result has the words and the facts. */
export function show(state, words, facts) {
  const box = document.getElementById("result");
  box.className = state;
  box.textContent = "";
  element(box, "strong", `${state === "ok" ? "✓" : "✗"} ${words}`);
  const list = element(box, "div", "", { class: "facts" });
  for (const [name, value] of Object.entries(facts)) {
    const fact = element(list, "div");
    element(fact, "b", value);
    element(fact, "span", name);
  }
  const detail = facts["difference, of the largest number"];
  document.title = `${state} ${detail === undefined ? words : `difference ${detail}`}`;
}

export function showTensor(where, { name, type, shape, values, expected }) {
  const box = element(document.getElementById(where), "div", "", { style: "margin-bottom: 16px" });
  element(box, "h2", name);
  element(box, "p", `${type} [${shape.join(", ")}]`, { class: "dim" });
  const picture = expected === undefined && layout(shape, type);
  if (picture) draw(box, values, picture);
  else if (expected !== undefined && values.length) bars(box, values, expected);
  else element(box, "code", preview(values, type), { style: "white-space: pre-wrap" });
}

const short = (x) => (Number.isInteger(x) ? String(x) : x.toPrecision(4));

/** The first numbers; bytes that are mostly text as text. */
function preview(values, type) {
  const some = [...values.slice(0, 400)];
  const bytes = some.filter((x) => x >= 0 && x < 256); // what is beyond is padding
  const text = bytes.filter((x) => x === 9 || x === 10 || x === 13 || (x >= 32 && x < 127)).length;
  if (!type.startsWith("float") && bytes.length > 64 && text > 0.95 * bytes.length) {
    return String.fromCharCode(...bytes) + (values.length > 400 ? " …" : "");
  }
  return some.slice(0, 48).map(short).join(", ") + (values.length > 48 ? ", …" : "");
}

/** How to read the first sample as a picture, or null. */
function layout(shape, type) {
  if (type === "int64" || shape.length < 3 || shape.length > 4) return null;
  const [a, b, c] = shape.slice(-3);
  if (shape.length === 4 || a <= 4 || c <= 4) {
    if ((a === 1 || a === 3) && b > 3 && c > 3) return { height: b, width: c, channels: a, step: 1, plane: b * c };
    if ((c === 1 || c === 3) && a > 3 && b > 3) return { height: a, width: b, channels: c, step: c, plane: 1 };
  }
  return null;
}

function draw(box, values, { height, width, channels, step, plane }) {
  const canvas = element(box, "canvas", "", { width, height, role: "img", "aria-label": "the first sample" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const some = values.slice(0, height * width * channels);
  let low = Infinity, high = -Infinity;
  for (const x of some) { low = Math.min(low, x); high = Math.max(high, x); }
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) {
      const value = some[i * step + (channels === 3 ? c : 0) * plane];
      image.data[4 * i + c] = (255 * (value - low)) / (high - low || 1);
    }
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** The first numbers, or the largest of many, as bars; a tick marks what was expected. */
function bars(box, values, expected) {
  let order = [...values.keys()];
  const many = order.length > MOST_ROWS;
  if (many) order = order.sort((i, j) => expected[j] - expected[i]).slice(0, MOST_ROWS);
  const shown = order.flatMap((i) => [values[i], expected[i]]).filter(Number.isFinite);
  const low = Math.min(0, ...shown), high = Math.max(0, ...shown), span = high - low || 1;
  const at = (x) => (Number.isFinite(x) ? (100 * (Math.min(high, Math.max(low, x)) - low)) / span : 0);
  for (const i of order) {
    const row = element(box, "div", "", { class: "row" });
    element(row, "span", String(i), { class: "number dim" });
    const line = element(row, "div", "", { style: `--zero: ${at(0)}%` });
    const [from, to] = [Math.min(at(0), at(values[i])), Math.max(at(0), at(values[i]))];
    element(line, "i", "", { style: `left: ${from}%; width: ${to - from}%` });
    element(line, "u", "", { style: `left: ${at(expected[i])}%` });
    element(row, "span", short(values[i]), { class: "number" });
  }
  const key = element(box, "p", "", { class: "dim key" });
  key.append(many ? `the ${MOST_ROWS} largest of ${values.length}` : `all ${values.length}`);
  element(key, "i"); key.append("here");
  element(key, "u"); key.append("expected");
}
