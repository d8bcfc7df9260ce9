"use strict";
const $ = id => document.getElementById(id);
const rates = [];
let last = null, running = null;

const headers = () => $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};

function size(bytes) {
  for (const [factor, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (bytes >= factor) return `${(bytes / factor).toFixed(bytes < 10 * factor ? 2 : 1)} ${unit}`;
  return `${bytes} B`;
}

function make(name, text, properties = {}) {
  const element = Object.assign(document.createElement(name), properties);
  if (text !== null) element.textContent = text;
  return element;
}

function trouble(message) {
  $("trouble").hidden = !message;
  $("trouble").textContent = message;
}

/* What is served: drawn once. */
function drawLayout(now) {
  const table = $("layout"), layers = now.kv_owner.length;
  const head = make("tr", null);
  head.append(make("th", "group"));
  for (let layer = 0; layer < layers; layer++)
    head.append(make("th", layer % 5 === 0 || layers <= 16 ? layer : ""));
  head.append(make("th", "in use"));
  table.replaceChildren(head, ...now.groups.map(group => {
    const row = make("tr", null);
    row.append(make("th", group.index));
    for (let layer = 0; layer < layers; layer++) {
      const member = group.layers.includes(layer);
      row.append(make("td", !member ? "·" : layer === group.layers[0] ? "●" : "○"));
    }
    const meter = make("td", null, { className: "meter" });
    meter.append(make("i", null), make("span", ""));
    row.append(meter);
    return row;
  }));
  $("model").textContent = now.model;
  document.title = `${now.model} · cla-export`;
  $("about").textContent = `${now.about}; on ${now.backend}, `
    + `${now.slots.length} slots of ${now.capacity.toLocaleString("en")} tokens`;
  $("saved").textContent = `${size(now.bytes_per_token)} a token; without sharing `
    + `${size(now.dense_bytes_per_token)}, and ${now.dense_slots} slots in the same memory.`;
}

/* What happens: drawn twice a second. */
function draw(now) {
  const used = now.slots.filter(slot => slot.state === "decoding" || slot.state === "prefilling")
    .reduce((sum, slot) => sum + slot.tokens, 0);
  const rows = $("slots");
  while (rows.children.length < now.slots.length) {
    const row = make("div", null, { className: "slot" });
    const bar = make("div", null, { className: "bar" });
    bar.append(make("i", null));
    row.append(make("span", rows.children.length), bar, make("span", ""));
    rows.append(row);
  }
  now.slots.forEach((slot, index) => {
    const [, bar, said] = rows.children[index].children;
    bar.firstChild.className = slot.state;
    bar.firstChild.style.width = `${100 * slot.tokens / now.capacity}%`;
    said.textContent = slot.state === "free" ? "free" : `${slot.tokens} ${
      { decoding: "tokens", prefilling: "read", kept: "kept" }[slot.state]}`;
  });
  now.groups.forEach((group, index) => {
    const [bar, said] = $("layout").rows[index + 1].querySelector(".meter").children;
    const whole = now.capacity * now.slots.length;
    bar.style.width = `${80 * used / whole}px`;
    said.textContent = size(used * group.bytes_per_token);
  });
  const seconds = last ? now.clock - last.clock : 0;
  const rate = seconds > 0 ? (now.generated - last.generated) / seconds : 0;
  last = now;
  rates.push(rate);
  if (rates.length > 120) rates.shift();
  const top = Math.max(1, ...rates);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", rates.map((value, i) =>
    `${i ? "L" : "M"}${600 - 5 * (rates.length - 1 - i)},${57 - 54 * value / top}`).join(""));
  $("spark").replaceChildren(path);
  $("rate").textContent = rate.toFixed(rate < 10 ? 1 : 0);
  $("running").textContent = now.running;
  $("waiting").textContent = now.waiting;
  $("used").textContent = size(used * now.bytes_per_token);
}

async function refresh() {
  try {
    const got = await fetch("status", { headers: headers() });
    $("key_label").hidden = got.status !== 401 && !$("key").value;
    if (got.ok) {
      const now = await got.json();
      if (!last) drawLayout(now);
      draw(now);
      trouble(now.state === "ready" ? "" : `The engine is ${now.state}.`);
    } else trouble((await got.json()).error.message);
  } catch { trouble("The server does not answer."); }
  setTimeout(refresh, 500);
}

/* A stream's events, one by one. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines)
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

async function generate() {
  const n = Number($("n").value), prompt = $("prompt").value, began = performance.now();
  const body = {
    prompt, n, stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("max_tokens").value), temperature: Number($("temperature").value),
    seed: Number($("seed").value),
  };
  const answers = [...Array(n)].map(() => {
    const answer = make("p", null);
    answer.append(make("b", prompt), make("span", ""));
    return answer;
  });
  $("answers").replaceChildren(...answers);
  $("usage").textContent = "";
  running = new AbortController();
  $("go").disabled = !($("stop").disabled = false);
  let first = 0;
  try {
    const response = await fetch("v1/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body),
      headers: { "content-type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      first ||= performance.now();
      for (const choice of event.choices)
        answers[choice.index].lastChild.append(choice.text);
      if (event.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
        const seconds = (performance.now() - first) / 1000;
        $("usage").textContent = `${prompt_tokens} tokens of prompt, `
          + `${prompt_tokens_details.cached_tokens} of them cached; ${completion_tokens} new, `
          + `the first after ${(first - began).toFixed(0)} ms, then `
          + `${((completion_tokens - n) / Math.max(seconds, 1e-3)).toFixed(0)} a second`;
      }
    }
  } catch (error) {
    $("usage").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  $("go").disabled = !($("stop").disabled = true);
}

$("form").addEventListener("submit", event => { event.preventDefault(); generate(); });
$("stop").addEventListener("click", () => running && running.abort());
refresh();
