// The viewer of a report: NiiVue, the controls around it, and the rows of the tables of lesions.
// Written by hand; `viewer-data` is what tf_lesion/report/viewer.py made.
(() => {
"use strict";

const byId = id => document.getElementById(id);
const data = JSON.parse(byId("viewer-data").textContent);
const form = byId("viewer"), controls = form.elements, stage = form.querySelector(".stage");
const layers = Object.fromEntries(data.layers.map(layer => [layer.name, layer]));
const HEAT = [[0, "#7a0f6e"], [90, "#d8265e"], [170, "#ff8a3a"], [255, "#fff3c4"]];
const OUTLINE = {truth: "#00d0ff", brain: "#ffffff"}, FOUND = "#ffd400", CHOSEN = "#5dff5d";
const VIEWS = ["axial", "coronal", "sagittal", "all"];
const SLIDER = 1000, LOWEST = 1e-3;  // the threshold slider is logarithmic, from this share of the end
const ZOOM = 1.25, FARTHEST = 8, PAD = 3;
const COLOR_FROM_ZERO = 2, WINDOWING = 9, NEVER = 0;  // of NiiVue
const INSIDE = 0.03, RIM = 1;  // opacity of a mask

const rgb = hex => [1, 3, 5].map(start => parseInt(hex.slice(start, start + 2), 16));
const text = value => value === 0 ? "0" : Number(value.toPrecision(3)).toString();

function say(problem) {
  byId("no-viewer").hidden = false;
  byId("no-viewer").textContent = problem + " The slices below show the scan, the maps and the mask.";
  document.body.classList.add("no-viewer");
}

if (!document.createElement("canvas").getContext("webgl2")) {
  say("No viewer: this browser shows no WebGL 2, or it is switched off.");
  return;
}

const nv = new niivue.Niivue({
  backColor: [0, 0, 0, 1], crosshairColor: [0.35, 0.8, 1, 0.8], crosshairWidth: 1, crosshairGap: 6,
  fontColor: [0.95, 0.95, 0.95, 1], fontMinPx: 13, show3Dcrosshair: false, isColorbar: false,
  isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarShowRender: NEVER,
  multiplanarPadPixels: PAD, dragMode: WINDOWING, dragAndDropEnabled: false,
  scrollRequiresFocus: true, loadingText: "", logLevel: "error",
});
// The first entry is for the value 0, which is never colored.
const heat = [[0, HEAT[0][1]], [1, HEAT[0][1]], ...HEAT.slice(1)];
nv.addColormap("heat", {
  ...Object.fromEntries(["R", "G", "B"].map((c, i) => [c, heat.map(([, hex]) => rgb(hex)[i])])),
  A: heat.map(([at]) => at ? 255 : 0), I: heat.map(([at]) => at),
});

[nv.drawOpacity, nv.drawRimOpacity] = [INSIDE, RIM];

// ---- layers: read when they are first shown ----

const images = {};

function image(name) {
  images[name] ??= (async () => {
    const {nifti, kind, from, to} = layers[name];
    const made = await niivue.NVImage.loadFromBase64({
      base64: nifti, name: `${name}.nii.gz`, colormap: kind === "map" ? "heat" : "gray",
      ...(kind === "mask" ? {} : {cal_min: from, cal_max: to}),
    });
    if (kind === "map") made.colormapType = COLOR_FROM_ZERO;
    delete layers[name].nifti;
    made.layer = layers[name];
    loaded[name] = made;
    return made;
  })();
  return images[name];
}
const loaded = {};

// NiiVue outlines its drawing in each slice; the masks are drawings. Lesions beyond 255 share a number.
function paint() {
  const name = controls.mask.value;
  if (!name || !nv.back) return;
  const lut = new Uint8ClampedArray(256 * 4);
  for (let number = 1; number < 256; number++) {
    const chosen = layers[name].count && number === lesion?.number;
    lut.set([...rgb(chosen ? CHOSEN : OUTLINE[name] ?? FOUND), 255], 4 * number);
  }
  nv.drawLut = {lut, labels: Array(256).fill("")};
  nv.refreshColormaps();
  nv.drawScene();
}

let wanted = 0, hidden = false;

async function draw() {
  const turn = ++wanted;
  const names = [controls.gray.value, hidden ? "" : controls.map.value].filter(Boolean);
  const outlined = hidden ? "" : controls.mask.value;
  const [mask, ...shown] = await Promise.all([outlined && image(outlined), ...names.map(image)]);
  if (turn !== wanted) return;
  for (const each of shown.slice(1)) {
    each.cal_min = thresholds[each.layer.name];
    each.opacity = controls.opacity.value / 100;
  }
  nv.volumes = shown;
  [nv.back, nv.overlays] = [shown[0], shown.slice(1)];
  nv.updateGLVolume();
  if (mask) nv.loadDrawing(mask); else nv.closeDrawing();
  paint();
  form.dataset.drawn = [...names, outlined].join(" ").trim();
}

let waiting = false;
function drawSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

// ---- threshold and opacity ----

const thresholds = Object.fromEntries(
  data.layers.filter(layer => layer.kind === "map").map(layer => [layer.name, layer.from]));

function scale(name) {
  const low = layers[name].to * LOWEST;
  return {
    value: place => low * (layers[name].to / low) ** (place / SLIDER),
    place: value => SLIDER * Math.log(value / low) / Math.log(layers[name].to / low),
  };
}

function tell() {
  const name = controls.map.value;
  controls.threshold.disabled = controls.opacity.disabled = !name;
  byId("opacity-said").textContent = `${controls.opacity.value} %`;
  byId("threshold-said").textContent = "–";
  byId("bar").hidden = !name;
  if (!name) return;
  const value = thresholds[name], {unit, to} = layers[name];
  controls.threshold.value = scale(name).place(value);
  const point = Object.values(data.points).find(p => name === data.made_from && p.threshold === value);
  byId("threshold-said").textContent = text(value) + (point ? ` (${point.label} threshold)` : "");
  const colors = HEAT.map(([at, hex]) => `${hex} ${at / 2.55}%`).join(", ");
  const bar = byId("bar");
  bar.querySelector("i").style.background = `linear-gradient(to right, ${colors})`;
  bar.querySelector("b").textContent = text(to);
  bar.querySelector("span").textContent = `${name}${unit ? `, ${unit}` : ""}`;
}

function setThreshold(value) {
  const name = controls.map.value;
  if (!name) return;
  thresholds[name] = Math.min(Math.max(value, layers[name].to * LOWEST), layers[name].to);
  tell();
  drawSoon();
}

function takeThresholdOf(point) {
  if (point in data.points && data.made_from in thresholds)
    thresholds[data.made_from] = data.points[point].threshold;
}

// ---- lesions: the rows of the table of the threshold that is outlined ----

const tables = [...document.querySelectorAll(".lesions")];
let lesion = null;

const table = () => tables.find(each => !each.hidden);
const rows = () => [...(table()?.querySelectorAll("tr[data-mm]") ?? [])];
const of = row => ({row, number: Number(row.dataset.lesion), mm: row.dataset.mm.split(" ").map(Number)});

function mark(row) {
  document.querySelectorAll("tr.at").forEach(each => each.classList.remove("at"));
  row?.classList.add("at");
  const before = lesion?.number;
  lesion = row ? of(row) : null;
  const all = rows();
  byId("lesion-said").textContent =
    row ? `${lesion.number} of ${all.length}, ${row.dataset.ml} ml` : `– of ${all.length}`;
  if (before !== lesion?.number) paint();
}

function go(mm) {
  nv.scene.crosshairPos = nv.mm2frac(mm);
  nv.drawScene();
  nv.createOnLocationChange();
}

function choose(row) {
  if (!row) return;
  table().classList.toggle("all", table().classList.contains("all") || row.classList.contains("rest"));
  mark(row);
  go(lesion.mm);
}

function step(by) {
  const all = rows(), now = all.indexOf(lesion?.row);
  if (all.length) choose(all[now < 0 ? (by > 0 ? 0 : all.length - 1) : (now + by + all.length) % all.length]);
}

function showTable(point) {
  if (!tables.some(each => each.dataset.point === point)) return;
  tables.forEach(each => { each.hidden = each.dataset.point !== point; });
  mark(null);
}

tables.forEach(each => each.addEventListener("click", event => {
  if (event.target.closest(".more")) each.classList.add("all");
  const row = event.target.closest("tr[data-mm]");
  if (!row) return;
  choose(row);
  stage.scrollIntoView({block: "nearest", behavior: "smooth"});
}));

nv.onLocationChange = ({mm}) => {
  const at = name => { const each = loaded[name]; return each.getValue(...each.mm2vox(Array.from(mm)).slice(0, 3)); };
  const values = Object.keys(thresholds).filter(name => loaded[name]).map(name => `${name} ${text(at(name))}`);
  const place = ["x", "y", "z"].map((axis, i) => `${axis} ${mm[i].toFixed(0)}`).join(", ");
  byId("place").textContent = [`${place} mm`, ...values].join(" · ");
  const mask = controls.mask.value;
  if (!layers[mask]?.count || !loaded[mask]) return;
  const number = at(mask);
  const row = number && number < 255 && rows().find(each => Number(each.dataset.lesion) === number);
  if (row && row !== lesion?.row) mark(row);
};

// ---- view, zoom, window ----

function zoom(by) {
  const pan = nv.scene.pan2Dxyzmm, mm = nv.frac2mm(nv.scene.crosshairPos);
  const now = Math.min(Math.max(pan[3] * by, 1), FARTHEST);
  const moved = now === 1 ? [0, 0, 0] : [0, 1, 2].map(i => pan[i] + (pan[3] - now) * mm[i]);
  nv.setPan2Dxyzmm([...moved, now]);
}

async function reset() {
  zoom(0);
  for (const each of Object.values(loaded).filter(made => made.layer.kind === "gray"))
    [each.cal_min, each.cal_max] = [each.layer.from, each.layer.to];
  for (const name of Object.keys(thresholds)) thresholds[name] = layers[name].from;
  takeThresholdOf(controls.mask.value);
  tell();
  drawSoon();
}

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen(); else form.requestFullscreen?.();
}

function pick(name, index) {
  const options = [...controls[name]], now = options.findIndex(each => each.checked);
  const next = options[index ?? (now + 1) % options.length];
  if (next) { next.checked = true; changed(name); }
}

function changed(name) {
  if (name === "view") {
    form.dataset.view = VIEWS[controls.view.value];
    nv.setSliceType(Number(controls.view.value));
    return;
  }
  if (name === "mask") { takeThresholdOf(controls.mask.value); showTable(controls.mask.value); }
  tell();
  drawSoon();
}

form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("input", ({target}) => {
  if (target.name === "threshold") setThreshold(scale(controls.map.value).value(target.value));
  else changed(target.name);
});
const buttons = {previous: () => step(-1), next: () => step(1), reset, full: fullScreen};
for (const [name, act] of Object.entries(buttons)) controls[name].addEventListener("click", act);

// ---- keys: letters anywhere on the page, arrows with the viewer in focus ----

const nudge = (name, by) => { controls[name].value = Number(controls[name].value) + by; changed(name); };
const farther = by => setThreshold(thresholds[controls.map.value] * by);
const KEYS = {
  n: () => step(1), p: () => step(-1), b: () => pick("gray"), c: () => pick("map"), v: () => pick("view"),
  "[": () => nudge("opacity", -10), "]": () => nudge("opacity", 10),
  ",": () => farther(1 / 1.1), ".": () => farther(1.1), "+": () => zoom(ZOOM), "=": () => zoom(ZOOM),
  "-": () => zoom(1 / ZOOM), r: reset, f: fullScreen,
};
// Right on the screen is the patient's left (-x), and in sagittal slices posterior (-y).
const PLANES = {axial: [0, 1, 2], all: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0]};
const STEPS = {ArrowLeft: [0, 1], ArrowRight: [0, -1], ArrowUp: [1, 1], ArrowDown: [1, -1], PageUp: [2, 1], PageDown: [2, -1]};

function move(key) {
  const [which, by] = STEPS[key], voxels = [0, 0, 0];
  voxels[PLANES[form.dataset.view][which]] = by;
  nv.moveCrosshairInVox(...voxels);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const {key, target} = event, inside = stage.contains(target);
  if (inside) event.stopPropagation();  // NiiVue has keys of its own
  if (key in STEPS && inside) move(key);
  else if (key === " " && (inside || target === document.body)) {
    if (!hidden) { hidden = true; draw(); }
  } else if (/^[0-9]$/.test(key)) pick("mask", Number(key));
  else if (key in KEYS) KEYS[key]();
  else return;
  event.preventDefault();
}, true);
document.addEventListener("keyup", event => {
  if (stage.contains(event.target)) event.stopPropagation();
  if (event.key === " " && hidden) { hidden = false; draw(); }
}, true);

// ---- start ----

(async () => {
  document.body.classList.remove("no-viewer");
  await nv.attachToCanvas(form.querySelector("canvas"));
  if (form.clientWidth < 640) controls.view.value = "0";
  changed("view");
  tell();
  mark(null);
  await draw();
  go(data.start);
  if (rows().length) mark(rows()[0]);
  for (const name of Object.keys(thresholds)) await image(name);  // for the values at the cross
  nv.createOnLocationChange();
  form.dataset.ready = "yes";
})().catch(problem => say(`No viewer: ${problem.message ?? problem}.`));
})();
