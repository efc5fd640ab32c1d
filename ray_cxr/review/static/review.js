// The page of a study: zoom, gray values and heat maps in the browser, and verdicts that are kept until they are saved.
"use strict";

const get = (id) => document.getElementById(id);
const data = get("data").dataset;
const row = Number(data.row);
const isHidden = data.hidden === "1";

// ---- Image: one transform for image, heat map and boxes; one filter for gray values ----

const stage = get("stage");
const image = get("image");
const view = { scale: 1, x: 0, y: 0, isFitted: true, isInverted: false };
let redraw = 0;

function draw() {
  if (redraw) return;
  redraw = requestAnimationFrame(() => {
    redraw = 0;
    const transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
    for (const layer of [image, get("heat"), get("boxes")]) {
      layer.style.transform = transform;
      layer.style.width = `${image.naturalWidth}px`;
      layer.style.height = `${image.naturalHeight}px`;
    }
    image.classList.toggle("pixels", view.scale * devicePixelRatio >= 3);
    const slope = 2 ** (get("contrast").value / 50);
    const intercept = 0.5 - 0.5 * slope + get("brightness").value / 100;
    for (const part of get("window").firstElementChild.children) {
      part.setAttribute("slope", view.isInverted ? -slope : slope);
      part.setAttribute("intercept", view.isInverted ? 1 - intercept : intercept);
    }
    get("film").classList.toggle("plain", slope === 1 && intercept === 0 && !view.isInverted);
    get("invert").setAttribute("aria-pressed", view.isInverted);
    get("preset").value = `${get("contrast").value} ${get("brightness").value}`;
    if (get("preset").selectedIndex < 0) get("preset").value = "";
  });
}

function fit() {
  const width = stage.clientWidth, height = stage.clientHeight;
  view.scale = Math.min(width / image.naturalWidth, height / image.naturalHeight);
  view.x = (width - view.scale * image.naturalWidth) / 2;
  view.y = (height - view.scale * image.naturalHeight) / 2;
  view.isFitted = true;
  draw();
}

function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const smallest = Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight) / 2;
  const scale = Math.min(32, Math.max(smallest, view.scale * factor));
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  view.isFitted = false;
  draw();
}

function pan(x, y) {
  view.x += x;
  view.y += y;
  view.isFitted = false;
  draw();
}

function shiftGray(contrast, brightness) {
  get("contrast").value = Number(get("contrast").value) + contrast;
  get("brightness").value = Number(get("brightness").value) + brightness;
  draw();
}

function setGray(contrast, brightness) {
  get("contrast").value = contrast;
  get("brightness").value = brightness;
  draw();
}

function listenToPointers() {
  const pointers = new Map();
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return { length: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  };
  stage.addEventListener("contextmenu", (event) => event.preventDefault());
  stage.addEventListener("pointerdown", (event) => {
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  for (const name of ["pointerup", "pointercancel"]) {
    stage.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }
  stage.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? spread() : null;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    const x = event.clientX - last.x, y = event.clientY - last.y;
    if (before) {
      const after = spread(), edge = stage.getBoundingClientRect();
      zoom(after.length / (before.length || 1), after.x - edge.left, after.y - edge.top);
      pan(after.x - before.x, after.y - before.y);
    } else if (event.buttons & 2) {
      shiftGray(x / 3, -y / 3);
    } else {
      pan(x, y);
    }
  });
  const place = (event) => {
    const edge = stage.getBoundingClientRect();
    return [event.clientX - edge.left, event.clientY - edge.top];
  };
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...place(event));
  }, { passive: false });
  stage.addEventListener("dblclick", (event) => (view.isFitted ? zoom(2.5, ...place(event)) : fit()));
}

async function explainImage() {
  const panel = document.createElement("div");
  panel.className = "unread";
  panel.setAttribute("role", "alert");
  let text = "the server does not answer; reload the page";
  try {
    const answer = await fetch(image.src);
    if (answer.ok) return image.removeAttribute("hidden");
    const found = await answer.json();
    text = `${found.error} (${found.code})`;
  } catch { /* the text above */ }
  panel.textContent = `This image cannot be read now: ${text}`;
  image.hidden = true;
  stage.append(panel);
}

// ---- Heat map, boxes, labels: off until requested ----

const heat = get("heat");
let wantsHeat = false;
let seesLabels = false;

async function showHeat() {
  const { finding, name } = chosen.dataset;
  heat.hidden = true;
  get("map")?.setAttribute("aria-pressed", wantsHeat);
  get("opaque")?.toggleAttribute("hidden", !wantsHeat);
  get("caption").textContent = "";
  if (!wantsHeat) return;
  let text = "the server does not answer";
  let map = null;
  try {
    const answer = await fetch(`/heatmap/${row}/${encodeURIComponent(finding)}`);
    if (answer.headers.get("content-type") === "image/png") map = await answer.blob();
    else text = (await answer.json()).error;
  } catch { /* the text above */ }
  if (!wantsHeat || finding !== chosen.dataset.finding) return;
  get("caption").textContent = map ? `Heat map of ${name}: where the model's evidence is, not how strong`
    : `No heat map of ${name}: ${text}`;
  if (!map) return;
  URL.revokeObjectURL(heat.src);
  heat.src = URL.createObjectURL(map);
  heat.hidden = false;
  draw();
}

function listenToLayers() {
  get("opacity")?.addEventListener("input", () => { heat.style.opacity = get("opacity").value / 100; });
}

function toggleLabels() {
  seesLabels = !seesLabels;
  for (const cell of document.querySelectorAll(".truth")) cell.hidden = !seesLabels;
  get("label").setAttribute("aria-pressed", seesLabels);
}

function toggleBoxes() {
  const isShown = get("boxes").toggleAttribute("hidden") === false;
  get("box").setAttribute("aria-pressed", isShown);
}

// ---- Verdicts: shown at once, sent in order, kept until the server confirms ----

let state = JSON.parse(data.state);
let chosen = null;
let isSending = false;
let retry = null;
let destination = null;
const queue = [];
const drafts = new Map();
const rows = [...document.querySelectorAll("#findings tbody tr")];

function listVerdicts() {
  const verdicts = { ...state.verdicts };
  for (const { body } of queue) {
    if (!body.row && body.row !== 0) continue;
    const names = body.finding ? [body.finding] : rows.map((each) => each.dataset.finding).filter((name) => !verdicts[name]);
    for (const name of names) {
      const flag = rows.find((each) => each.dataset.finding === name).dataset.flag;
      const present = body.present ?? { agree: Number(flag), disagree: 1 - Number(flag) }[body.verdict] ?? null;
      const verdict = body.verdict ?? (isHidden || flag === "" ? null : present === Number(flag) ? "agree" : "disagree");
      verdicts[name] = { verdict, present, note: body.note, isPending: true };
    }
  }
  return verdicts;
}

function describeVerdict(verdict) {
  if (!verdict) return "";
  if (verdict.present === null) return "unsure";
  const text = verdict.present ? "present" : "absent";
  return verdict.verdict ? `${verdict.verdict}: ${text}` : text;
}

function showVerdicts() {
  const verdicts = listVerdicts();
  for (const each of rows) {
    const verdict = verdicts[each.dataset.finding];
    const cell = each.querySelector(".verdict");
    cell.textContent = describeVerdict(verdict) + (verdict?.isPending ? " …" : "");
    cell.className = `verdict ${verdict?.verdict ?? (verdict ? "own" : "")}`;
    const note = drafts.get(each.dataset.finding) ?? verdict?.note;
    if (note) {
      const text = document.createElement("span");
      text.className = "sub";
      text.textContent = drafts.has(each.dataset.finding) ? `${note} (saved with your verdict)` : note;
      cell.append(text);
    }
  }
  const given = verdicts[chosen?.dataset.finding];
  get("given").textContent = given ? `Your verdict: ${describeVerdict(given)}` : "";
  if (queue.length) get("saved").textContent = "saving …";
}

function choose(position) {
  if (!rows[position]) return;
  chosen = rows[position];
  for (const each of rows) {
    each.classList.toggle("chosen", each === chosen);
    each.querySelector("button").setAttribute("aria-pressed", each === chosen);
  }
  const { flag, name } = chosen.dataset;
  const model = isHidden ? "" : { 1: ": the model flags it", 0: ": no flag", "": ": the model has no operating point" }[flag];
  get("chosen").textContent = name + model;
  const texts = isHidden || flag === "" ? ["Present", "Absent"]
    : flag === "1" ? ["Agree: present", "Disagree: absent"] : ["Agree: absent", "Disagree: present"];
  ["agree", "disagree"].forEach((id, n) => {
    get(id).firstChild.textContent = `${texts[n]} `;
    get(id).setAttribute("aria-label", `${name}: ${texts[n].toLowerCase()}, key ${"ad"[n]}`);
  });
  get("unsure").setAttribute("aria-label", `${name}: unsure, key u`);
  showVerdicts();
  if (wantsHeat) showHeat();
}

/** A key that is pressed while another image opens belongs to neither image. */
function isLeaving() {
  if (destination) get("caption").textContent = "Not recorded: another image is opening";
  return Boolean(destination);
}

function chooseByKey(position) {
  choose(position);
  chosen?.scrollIntoView({ block: "nearest" });
}

function decide(choice) {
  if (!chosen || isLeaving()) return;
  const finding = chosen.dataset.finding;
  const note = drafts.get(finding) ?? listVerdicts()[finding]?.note ?? "";
  drafts.delete(finding);
  const isOwn = choice !== "unsure" && (isHidden || chosen.dataset.flag === "");
  post(isOwn ? { finding, present: choice === "agree" ? 1 : 0, note } : { finding, verdict: choice, note });
}

function decideRest() {
  if (isLeaving()) return;
  const verdicts = listVerdicts();
  if (rows.some((each) => !verdicts[each.dataset.finding])) post({ finding: null, present: 0, note: "" });
}

function post(body) {
  const hasBoxes = !get("boxes").hasAttribute("hidden");
  const visible = { heatmap: !heat.hidden, labels: seesLabels || hasBoxes };
  queue.push({ path: "/verdicts", body: { row, ...body, ...visible } });
  showVerdicts();
  send();
}

function undo() {
  destination = null;
  // A verdict that was not sent yet is simply dropped.
  if (queue.length > (isSending ? 1 : 0)) {
    queue.pop();
    if (!queue.length) showFailure("");
  } else {
    queue.push({ path: "/undo", body: {} });
  }
  showVerdicts();
  if (queue.length) send();
  else get("saved").textContent = "";
}

async function send() {
  if (isSending || !queue.length) return;
  clearTimeout(retry);
  isSending = true;
  const { path, body } = queue[0];
  let status = 0, answer = {};
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(path, { ...options, keepalive: true, signal: AbortSignal.timeout(15000) });
    status = response.status;
    if (response.headers.get("content-type")?.includes("json")) answer = await response.json();
  } catch { status = 0; }
  isSending = false;
  if (status === 200) {
    queue.shift();
    finish(answer);
  } else if ([400, 409, 413, 415].includes(status)) {
    queue.shift();
    const isUndo = path === "/undo";
    destination = null;
    showVerdicts();
    get("saved").textContent = isUndo ? answer.error : "";
    showFailure(isUndo ? "" : `The verdict was refused: ${answer.error}`);
    send();
  } else {
    const reason = status === 401 ? "the session ended; open the address that ray-cxr review prints in another tab"
      : answer.error ?? "the server does not answer";
    const count = queue.length === 1 ? "1 verdict is" : `${queue.length} verdicts are`;
    get("saved").textContent = "not saved";
    showFailure(`${count} not saved: ${reason}. Keep this page open; it tries again every 3 seconds.`);
    retry = setTimeout(send, 3000);
  }
}

function finish(answer) {
  showFailure("");
  if (answer.row !== row) {
    if (!queue.length) leave(`/study/${answer.number}?image=${answer.row}`);
    return send();
  }
  state = answer;
  showVerdicts();
  if (queue.length) return send();
  get("saved").textContent = `saved ${new Date().toTimeString().slice(0, 5)}`;
  if (destination) leave(destination);
  else if (isHidden && !state.hidden && !drafts.size) location.reload();
}

function showFailure(text) {
  get("failed").hidden = !text;
  get("failed").textContent = text;
}

function leave(address) {
  // The second request leaves at once; the browser then asks because of unsaved verdicts.
  const isSecond = destination === address;
  destination = address;
  if (!queue.length || isSecond) location.assign(address);
}

function openNote() {
  if (!chosen || isLeaving()) return;
  const finding = chosen.dataset.finding;
  get("text").value = drafts.get(finding) ?? listVerdicts()[finding]?.note ?? "";
  get("notes-title").textContent = `Note on ${chosen.dataset.name}`;
  get("notes").showModal();
}

function saveNote() {
  const finding = chosen.dataset.finding, note = get("text").value.trim();
  const verdict = listVerdicts()[finding];
  if (!verdict && note) drafts.set(finding, note);
  else drafts.delete(finding);
  if (!verdict) return showVerdicts();
  post(verdict.present === null ? { finding, verdict: "unsure", note } : { finding, present: verdict.present, note });
}

// ---- Keys and buttons do the same ----

const actions = {
  j: () => get("j") && leave(get("j").href),
  k: () => get("k") && leave(get("k").href),
  "?": () => get("keys").showModal(),
};
const imageActions = {
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  0: () => { view.isInverted = false; setGray(0, 0); fit(); },
  i: () => { view.isInverted = !view.isInverted; draw(); },
  h: () => { if (!isHidden) { wantsHeat = !wantsHeat; showHeat(); } },
  l: () => get("label") && toggleLabels(),
  b: () => get("box") && toggleBoxes(),
  a: () => decide("agree"),
  d: () => decide("disagree"),
  u: () => decide("unsure"),
  r: decideRest,
  n: openNote,
  z: undo,
  ArrowUp: () => chooseByKey(rows.indexOf(chosen) - 1),
  ArrowDown: () => chooseByKey(rows.indexOf(chosen) + 1),
};
const moves = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] };
const buttons = {
  help: "?", out: "-", in: "+", reset: "0", invert: "i", map: "h", box: "b", label: "l",
  agree: "a", disagree: "d", unsure: "u", rest: "r", note: "n", undo: "z",
};

function stepImage(step) {
  const links = [...(get("images")?.querySelectorAll("a") ?? [])];
  const at = links.findIndex((link) => link.getAttribute("aria-current"));
  if (links.length) leave(links[(at + step + links.length) % links.length].href);
  else get("caption").textContent = "This study has no other image";
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const element = event.target;
  if (element.matches("textarea, select, input:not([type=range])")) return;
  if (element.matches("input") && /^(Arrow|Page|Home|End)/.test(key)) return;
  let action = actions[key];
  if (event.shiftKey && moves[key]) action = image ? () => pan(...moves[key]) : undefined;
  else if (!action && (key === "ArrowLeft" || key === "ArrowRight")) action = () => stepImage(key === "ArrowLeft" ? -1 : 1);
  if (!action && image && /^[1-9]$/.test(key)) action = () => chooseByKey(Number(key) - 1);
  if (!action && image) action = imageActions[key];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || event.shiftKey || /^([+=-]|ArrowUp|ArrowDown)$/.test(key)) action();
});

for (const [id, key] of Object.entries(buttons)) {
  get(id)?.addEventListener("click", () => (actions[key] ?? imageActions[key])());
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  if (!link || !queue.length) return;
  event.preventDefault();
  leave(link.href);
});
addEventListener("beforeunload", (event) => {
  if (!queue.length && !drafts.size) return;
  event.preventDefault();
  // The browser asks; the timer runs only if the reader stays.
  setTimeout(() => { destination = null; }, 500);
});
addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

if (image) {
  rows.forEach((each, position) => each.addEventListener("click", () => choose(position)));
  for (const id of ["contrast", "brightness"]) get(id).addEventListener("input", draw);
  get("preset").addEventListener("change", () => setGray(...get("preset").value.split(" ").map(Number)));
  get("notes").addEventListener("close", () => { if (get("notes").returnValue === "save") saveNote(); });
  get("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("notes").close("save");
  });
  get("notes").addEventListener("cancel", () => { get("notes").returnValue = ""; });
  image.addEventListener("load", fit);
  image.addEventListener("error", explainImage);
  if (image.complete) image.naturalWidth ? fit() : explainImage();
  new ResizeObserver(() => { if (view.isFitted && image.naturalWidth) fit(); }).observe(stage);
  listenToPointers();
  listenToLayers();
  choose(0);
}
