// The page: a reference, a text, and what each model finds. The chain of searches is the URL's fragment.
const at = (id) => document.getElementById(id);
// A step: {image_id or upload, text}. `asked` is the one that is answered; `taught` are the results that were called right.
const state = { steps: [], reference: null, models: [], asked: null, taught: new Set(), explains: false };

function element(name, fields = {}, ...children) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children); // names and texts are text nodes, never HTML
  return made;
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is vdg serve still running?");
  }
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  const detail = typeof content.detail === "string" ? content.detail : "the server refused this";
  throw new Error(answer.status === 503 ? "The server is busy; try again in a second." : detail);
}

const post = (path, content) => ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content) });

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

const picture = (reference) =>
  reference.image_id ? `v1/images/${reference.image_id}/thumbnail` : sessionStorage.getItem(reference.upload) || "data:,";

function setReference(reference) {
  state.reference = reference;
  at("reference").hidden = !reference;
  at("invite").hidden = Boolean(reference);
  if (reference) at("reference").src = picture(reference);
  at("prompt").textContent = state.steps.length ? "More like this, but" : "Like this photo, but";
}

// A small copy of an upload for the chain, which a reload keeps; the server keeps no pixels.
async function remember(name, file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, 256 / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.ceil(bitmap.width * scale), height: Math.ceil(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  sessionStorage.setItem(name, canvas.toDataURL("image/jpeg", 0.85));
}

async function upload(file) {
  if (!file) return;
  say("Reading the photo …");
  try {
    const { upload: name, image_id } = await ask("v1/images", { method: "PUT", body: file });
    await remember(name, file);
    state.steps = [];
    show([]);
    setReference(image_id ? { image_id } : { upload: name });
    say("");
    at("text").focus();
  } catch (error) {
    say(error.message, true);
  }
}

function card(hit, onclick, extra = "", ...tools) {
  const score = hit.score === undefined ? "" : hit.score.toFixed(3);
  const caption = element("figcaption", {}, element("b", { textContent: hit.rank ?? "" }), element("i", { textContent: hit.key }), score);
  const image = element("img", { src: `v1/images/${hit.image_id}/thumbnail`, alt: hit.key, loading: "lazy" });
  const button = element("button", { type: "button", className: "hit", onclick, title: hit.key }, element("figure", {}, image, caption));
  return element("li", { className: extra }, button, ...tools);
}

const taught = (hit) => [state.asked.image_id, hit.image_id, state.asked.text].join("~");

// "This one is right" and "why?": a triplet to train on, and what the generator says of reference and result.
function tools(hit) {
  const said = element("p", { className: "why" });
  said.role = "status";
  const made = [];
  if (state.asked.image_id) {
    const right = element("button", { type: "button", className: "right", textContent: "✓", title: "This one is right (R)", ariaLabel: "This one is right", onclick: () => teach(hit) });
    right.dataset.taught = taught(hit);
    right.ariaPressed = state.taught.has(taught(hit));
    made.push(right);
  }
  if (state.explains) {
    made.push(element("button", { type: "button", className: "explain", textContent: "?", title: "What does the generator say? (W)", ariaLabel: "What does the generator say?", onclick: () => explain(hit, said) }));
  }
  return [element("div", { className: "tools" }, ...made), said];
}

async function teach(hit) {
  const key = taught(hit);
  const verdict = state.taught.has(key) ? "undone" : "right";
  const { image_id: reference_id, text } = state.asked;
  try {
    await post("v1/labels/results", { label_id: labelId(), reference_id, target_id: hit.image_id, text, verdict });
    if (verdict === "right") state.taught.add(key);
    else state.taught.delete(key);
    document.querySelectorAll(".right").forEach((button) => (button.ariaPressed = state.taught.has(button.dataset.taught)));
    say(verdict === "right" ? `Kept: “${text}” leads to ${hit.key}. ✓ again takes it back.` : "Taken back.");
  } catch (error) {
    say(error.message, true);
  }
}

async function explain(hit, said) {
  said.textContent = "The generator looks …";
  const { text, ...reference } = state.asked;
  try {
    const { delta, log_probability } = await post("v1/explain", { reference, candidate: hit.image_id });
    const sure = element("span", { textContent: ` likelihood ${Math.exp(log_probability).toFixed(2)}`, title: `mean log-probability of its tokens ${log_probability.toFixed(2)}` });
    said.replaceChildren(delta ? element("q", { textContent: delta }) : "It says nothing.", sure);
  } catch (error) {
    said.textContent = error.message;
  }
}

function show(answers) {
  const first = new Map((answers[0]?.hits ?? []).map((hit) => [hit.image_id, hit.rank]));
  at("answers").replaceChildren(
    ...answers.map(({ model, hits }, column) => {
      const change = (hit) => (!column ? "" : !first.has(hit.image_id) ? "new" : first.get(hit.image_id) > hit.rank ? "up" : "");
      const list = hits.map((hit) => card(hit, () => goOn({ image_id: hit.image_id }), change(hit), ...tools(hit)));
      const row = state.models.find((one) => one.model === model);
      const recall = Object.entries(row?.metrics ?? {})[0];
      const note = recall ? `${recall[0]} ${recall[1].mean.toFixed(1)}` : "";
      const title = element("h2", {}, element("span", { className: "dot" }), model);
      return element("article", {}, element("header", {}, title, element("span", { className: "small", textContent: note })), element("ol", { className: "hits" }, ...list));
    }),
  );
  at("start").hidden = answers.length > 0;
}

function showChain() {
  const jump = (count) => () => {
    location.hash = encode(state.steps.slice(0, count));
  };
  at("chain").replaceChildren(
    ...state.steps.map((step, i) => {
      const image = element("img", { src: picture(step), alt: "" });
      return element("li", {}, element("button", { type: "button", onclick: jump(i + 1) }, image, element("span", { textContent: step.text })));
    }),
  );
}

function goOn(reference) {
  setReference(reference);
  at("text").value = "";
  at("text").focus();
  scrollTo({ top: 0, behavior: "smooth" });
}

const encode = (steps) => steps.map((s) => `${s.image_id ?? `u${s.upload}`}~${encodeURIComponent(s.text)}`).join("/");

function decode(hash) {
  return hash.split("/").filter(Boolean).map((part) => {
    const cut = part.indexOf("~"); // a text may hold more of them
    const name = part.slice(0, cut);
    return { ...(name.startsWith("u") ? { upload: name.slice(1) } : { image_id: name }), text: decodeURIComponent(part.slice(cut + 1)) };
  });
}

async function followHash() {
  try {
    state.steps = decode(location.hash.slice(1));
  } catch {
    state.steps = [];
  }
  showChain();
  const last = state.steps.at(-1);
  if (!last) {
    setReference(null);
    show([]);
    say("");
    return;
  }
  const { text, ...reference } = last;
  setReference(reference);
  at("text").value = text;
  at("go").disabled = true;
  say("Searching …");
  try {
    const found = await post("v1/search", { reference, text, models: state.models.slice(0, 4).map((one) => one.model), top: 20 });
    state.asked = last;
    show(found.answers);
    const steps = Object.entries(found.took_ms).map(([name, ms]) => `${name} ${ms.toFixed(1)} ms`);
    const marks = found.answers.length > 1 ? `. In ${found.answers.at(-1).model}, framed: not in ${found.answers[0].model}'s list; green rank: higher there.` : "";
    say(`${steps.join(", ")}${marks}`);
  } catch (error) {
    say(error.message, true);
  }
  at("go").disabled = false;
}

let seed = 1;
async function gallery() {
  const { images } = await ask(`v1/gallery?seed=${seed++}`);
  at("gallery").replaceChildren(...images.map((image) => card(image, () => { state.steps = []; goOn({ image_id: image.image_id }); })));
}

function submit(event) {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!state.reference) return say("Give a photo first: drop, paste or pick one, or choose one below.", true);
  if (!text) return say("Say what should differ.", true);
  const hash = `#${encode([...state.steps.filter((s) => encode([s]) !== encode([{ ...state.reference, text }])), { ...state.reference, text }])}`;
  if (hash === location.hash) followHash();
  else location.hash = hash;
}

// Arrows move between the photos of a list, by rows and columns as they lie on the screen.
function move(event) {
  const here = document.activeElement;
  if (at("search").hidden) return;
  if (event.key === "/" && here !== at("text")) {
    event.preventDefault();
    at("text").focus();
  }
  const list = here?.closest?.(".hits");
  if (!list) return;
  const tool = { r: ".right", w: ".explain" }[event.ctrlKey || event.metaKey || event.altKey ? "" : event.key];
  if (tool) here.closest("li").querySelector(tool)?.click();
  if (!event.key.startsWith("Arrow")) return;
  event.preventDefault();
  const all = [...document.querySelectorAll(".hits .hit")].filter((button) => button.offsetParent);
  const [vertical, sign] = { ArrowDown: [true, 1], ArrowUp: [true, -1], ArrowRight: [false, 1], ArrowLeft: [false, -1] }[event.key];
  const from = here.getBoundingClientRect();
  const distance = (button) => {
    const to = button.getBoundingClientRect();
    const along = sign * (vertical ? to.top - from.top : to.left - from.left);
    const across = Math.abs(vertical ? to.left - from.left : to.top - from.top);
    return along > 4 ? along + 4 * across : Infinity;
  };
  const next = all.reduce((best, one) => (distance(one) < distance(best) ? one : best), here);
  next.focus();
}

// Labelling: a queue of pairs, a verdict on a key.
const labelling = { queue: [], past: [], busy: false };
const VERDICTS = { n: ["no_change", "No change"], w: ["wrong", "Wrong pair"], x: ["skip", "Skip"] };

// crypto.randomUUID is missing where the page comes by plain HTTP from another machine.
const labelId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

async function judge(pair, verdict, text = "") {
  await post("v1/labels", { label_id: labelId(), triplet_id: pair.triplet_id, verdict, text, reason: pair.reason });
}

// One at a time: a key pressed while an answer is on its way would judge a pair that is not on the screen yet.
async function alone(work) {
  if (labelling.busy) return;
  labelling.busy = true;
  try {
    await work();
  } catch (error) {
    at("progress").textContent = error.message;
  } finally {
    labelling.busy = false;
  }
}

const decide = (verdict, text) => alone(async () => {
  const pair = labelling.queue[0];
  if (!pair) return;
  await judge(pair, verdict, text);
  labelling.past.push(labelling.queue.shift());
  await nextPair();
});

const undo = () => alone(async () => {
  const pair = labelling.past.at(-1);
  if (!pair) return;
  await judge(pair, "undone");
  labelling.queue.unshift(labelling.past.pop());
  await nextPair();
});

async function nextPair() {
  if (!labelling.queue.length) labelling.queue = (await ask("v1/queue?n=10")).pairs;
  const { of, counts, precision } = await ask("v1/labels/summary");
  const done = Object.values(counts).reduce((sum, count) => sum + count, 0);
  const share = precision ? `; ${(100 * precision.share).toFixed(0)} % of the generator's deltas are right (${(100 * precision.low).toFixed(0)} to ${(100 * precision.high).toFixed(0)}, of ${precision.judged})` : "";
  at("progress").textContent = `${done} of ${of.toLocaleString("en")} pairs judged${share}`;
  const pair = labelling.queue[0];
  at("edit").value = "";
  if (!pair) return;
  at("from").src = `v1/pairs/images/${pair.reference_id}`;
  at("to").src = `v1/pairs/images/${pair.target_id}`;
  const key = (name, text, onclick) => element("button", { type: "button", onclick }, element("b", { textContent: name }), text);
  at("deltas").replaceChildren(...pair.deltas.map((delta, i) => key(i + 1, delta, () => decide("right", delta))));
  at("keys").replaceChildren(
    ...Object.entries(VERDICTS).map(([name, [verdict, text]]) => key(name.toUpperCase(), text, () => decide(verdict))),
    key("Z", "Undo", undo),
  );
}

async function labelKey(event) {
  if (at("label").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.activeElement === at("edit")) {
    if (event.key === "Enter" && at("edit").value.trim()) await decide("edited", at("edit").value.trim());
    if (event.key === "Escape" || event.key === "Enter") at("edit").blur();
    return;
  }
  const delta = labelling.queue[0]?.deltas[Number(event.key) - 1];
  if (delta) await decide("right", delta);
  else if (VERDICTS[event.key]) await decide(VERDICTS[event.key][0]);
  else if (event.key === "z") await undo();
  else if (event.key === "e") {
    event.preventDefault();
    at("edit").focus();
  }
}

at("tab").addEventListener("click", async () => {
  const label = at("label").hidden;
  at("label").hidden = !label;
  at("search").hidden = label;
  at("help").hidden = label;
  at("tab").textContent = label ? "Search" : "Label pairs";
  at("tab").blur();
  if (label) await nextPair().catch((error) => (at("progress").textContent = error.message));
});
addEventListener("keydown", labelKey);
at("ask").addEventListener("submit", submit);
at("file").addEventListener("change", () => upload(at("file").files[0]));
at("drop").addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), at("file").click()));
at("more").addEventListener("click", () => gallery().catch((error) => say(error.message, true)));
addEventListener("keydown", move);
addEventListener("paste", (event) => upload([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
addEventListener("dragover", (event) => (event.preventDefault(), at("drop").classList.add("over")));
addEventListener("dragleave", () => at("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  upload(event.dataTransfer.files[0]);
});
addEventListener("hashchange", followHash);

try {
  const { run, images, models, explains } = await ask("v1/models");
  const { results } = await ask("v1/labels/results");
  Object.assign(state, { models, explains, taught: new Set(results.map((one) => [one.reference_id, one.target_id, one.text].join("~"))) });
  at("run").textContent = `· ${run} · ${images.toLocaleString("en")} photos · ${models.map((one) => one.model).join(", ")}`;
  await gallery();
  await followHash();
} catch (error) {
  say(error.message, true);
}
