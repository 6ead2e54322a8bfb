// A plane of the case: canvases and contours in voxels, which CSS puts in their place on the
// screen, and over them the crosshair and the ring of the brush.
import { askPlane, clone, find, findAll, hasEnded, write } from "./page.js";
import { changeWindow } from "./look.js";
import { set, state } from "./store.js";
import * as drawing from "./drawing.js";
import * as geometry from "./geometry.js";
import { beginAt } from "./tools.js";

const OUTLINE = 4; // pixels of the ring around the pointer that draws an outline

const ERASER = 5; // the button of a pen that is turned over

// The value that the tool draws; NaN for tools that draw nothing.
const drawnValue = () => parseInt(state.tool, 10);

// Make the brush larger, by "stepUp", or smaller, by "stepDown".
export function resize(step) {
  find("size")[step]();
  set({ size: find("size").valueAsNumber });
}

export class Plane {
  // `spec` describes the plane; send(stroke) draws, and promises whether it was done.
  constructor(spec, send) {
    /** @type {any} */ this.spec = spec;
    this.send = send;
    /** @type {any} */ this.data = null; // the newest plane, as of `askPlane`
    this.place = state.place; // in it
    this.key = ""; // what it shows, and of it what stays the same
    this.image = "";
    /** @type {any} */ this.stroke = null; // that is being drawn
    /** @type {any[]} */ this.sent = []; // strokes that no plane has yet
    /** @type {any} */ this.loading = null; // promises that what is asked for is drawn
    /** @type {any} */ this.contours = {}; // of each label map
    this.drawnStep = 0; // pixels of a voxel for which they are drawn
    this.isOutdated = false;
    this.drag = "";
    this.touches = new Map();
    /** @type {any} */ this.keyed = null; // the voxel and the slice that were drawn by a key
    /** @type {any} */ this.ruler = null; // where it was set, in voxels from the upper left corner
    /** @type {any} */ this.pointed = null; // where the pointer is on the screen
    this.parts = clone("plane");
    const { overlay, slider, title, view } = this.parts;
    title.textContent = spec.name;
    overlay.ariaLabel = `${spec.name} plane`;
    slider.ariaLabel = `${spec.name} plane, position`;
    slider.hidden = spec.through === null;
    slider.max = state.about.grid[spec.through] - 1;
    write(overlay, ...spec.sides);
    title.addEventListener("click", () => this.stroke || set({ large: spec.number }));
    slider.addEventListener("input", () => this.go(spec.through, slider.valueAsNumber));
    overlay.addEventListener("wheel", (event) => this.turnWheel(event), { passive: false });
    overlay.addEventListener("contextmenu", (event) => event.preventDefault());
    for (const type of ["mousedown", "mouseup"]) { // The browser would go back to another page.
      overlay.addEventListener(type, (event) => event.button > 2 && event.preventDefault());
    }
    overlay.addEventListener("pointerdown", (event) => this.press(event));
    overlay.addEventListener("pointermove", (event) => this.moveTo(event));
    overlay.addEventListener("lostpointercapture", (event) => this.release(event));
    overlay.addEventListener("pointerleave", () => this.point(null));
    overlay.addEventListener("keydown", (event) => this.pressKey(event));
    this.extent = { width: 0, height: 0 }; // of the view, which is slow to ask for
    this.fit();
    new ResizeObserver(() => {
      this.extent = { width: view.clientWidth, height: view.clientHeight };
      this.arrange();
    }).observe(view);
  }

  // ---- Geometry

  layout() {
    return geometry.layOut(this.spec, this.extent, this.pose);
  }

  voxelAt(place) {
    return geometry.voxelAt(this.spec, this.layout(), place);
  }

  // Where an event is in the view. A stroke keeps the place of its view on the screen, whatever
  // moves it meanwhile: a message above it, another plane that becomes large.
  placeOf(event) {
    const { left, top } = this.stroke?.frame ?? this.parts.overlay.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top, kind: event.pointerType };
  }

  take(pose) {
    this.pose = pose;
    this.arrange();
  }

  // Put the voxels and the crosshair in their place on the screen.
  arrange() {
    const { contours, overlay, stack } = this.parts;
    const view = this.layout();
    const { left, stepX, stepY, top } = view;
    stack.style.transform = `matrix(${stepX}, 0, 0, ${stepY}, ${left}, ${top})`;
    contours.style.transform = stack.style.transform; // in the SVG, whose lines keep their width
    stack.classList.toggle("reduced", stepX < 1);
    if (stepX !== this.drawnStep) this.drawContours(findAll("g", contours));
    const { x, y } = geometry.middleOf(this.spec, view, this.crosshair());
    overlay.style.setProperty("--x", `${x}px`);
    overlay.style.setProperty("--y", `${y}px`);
    if (this.pointed) this.point(this.pointed); // Something else lies under it now.
    else if (document.activeElement === overlay) set({ under: this.under(this.crosshair()) });
  }

  // Zoom at a place of the screen, or in the middle.
  zoom(factor, place = null) {
    const view = this.layout();
    const middle = { x: view.width / 2, y: view.height / 2 };
    this.take(geometry.zoomed(this.spec, view, this.pose, place ?? middle, factor));
  }

  pan(...pixels) {
    this.take(geometry.panned(this.spec, this.layout(), this.pose, pixels));
  }

  fit() {
    this.take({ zoom: 1, center: geometry.extentOf(this.spec).map((mm) => mm / 2) });
  }

  // ---- Mouse, pen, fingers, keys

  // Show the ring of the brush at a place of the screen, and tell what is there.
  point(place) {
    this.pointed = place;
    const value = drawnValue();
    const { ring } = this.parts;
    ring.hidden = !place || Number.isNaN(value);
    if (!ring.hidden) {
      const size = 2 * this.radius() * this.layout().scale || OUTLINE;
      Object.assign(ring.style, { left: `${place.x}px`, top: `${place.y}px`,
        width: `${size}px`, height: `${size}px`, color: drawing.inkOf(value, state.labels) });
    }
    set({ under: place && this.under(this.voxelAt(place)) });
  }

  // What is at a voxel of the plane; null outside of the image.
  under(voxel) {
    const { data, spec } = this;
    if (!data || !geometry.isInside(spec, voxel)) return null;
    const at = (spec.size[1] - 1 - voxel[1]) * data.columns + voxel[0];
    return { place: this.placeAt(voxel), value: data.image[at], refined: data.refined[at],
      network: data.network[at] };
  }

  // The voxel of the case that a voxel of the plane is.
  placeAt(/** @type {number[]} */ [x, y]) {
    return state.place.with(this.spec.across, x).with(this.spec.up, y);
  }

  // The radius of the brush in mm.
  radius() {
    if (!["disk", "ball"].includes(state.shape)) return 0;
    return ((state.size || 1) / 2) * Math.min(...this.spec.steps);
  }

  // The voxel of the plane under the crosshair.
  crosshair() {
    return [state.place[this.spec.across], state.place[this.spec.up]];
  }

  go(axis, place) {
    const last = state.about.grid[axis] - 1;
    if (!this.stroke) set({ place: state.place.with(axis, geometry.clamp(place, 0, last)) });
  }

  aim(place) {
    const voxel = geometry.voxelAt(this.spec, this.stroke?.layout ?? this.layout(), place);
    if (this.stroke) this.draw(voxel);
    else set({ place: this.placeAt(geometry.nearest(this.spec, voxel)) });
  }

  turnWheel(event) {
    const { offsetX: x, offsetY: y } = event;
    const turned = event.deltaY || event.deltaX;
    const { through } = this.spec;
    if (!turned) return;
    event.preventDefault();
    if (this.stroke) return;
    if (event.altKey) {
      resize(turned < 0 ? "stepUp" : "stepDown");
    } else if (event.ctrlKey || event.metaKey || event.shiftKey) {
      this.zoom(Math.exp(-geometry.clamp(turned, -150, 150) / 300), { x, y });
    } else if (through !== null) {
      this.go(through, state.place[through] + (turned < 0 ? 1 : -1));
    }
  }

  press(event) {
    if (event.button > 2 && event.button !== ERASER) return;
    const place = this.placeOf(event);
    const [other] = this.touches.values();
    if (other && other.kind !== place.kind) { // Only fingers pinch.
      if (place.kind === "touch") return; // a hand beside the pen
      this.touches.clear();
      this.stroke = null;
    }
    this.parts.overlay.setPointerCapture(event.pointerId);
    this.touches.set(event.pointerId, place);
    if (this.touches.size > 1) {
      this.drag = "pinch";
      this.stroke = null; // The first finger draws nothing.
      this.drawInk();
    } else if (event.button === 2) {
      this.drag = "window";
    } else if (event.button === ERASER) {
      this.drag = "aim";
      this.begin(0);
      this.aim(place);
    } else if (event.button === 1 || event.shiftKey || state.tool === "hand") {
      this.drag = "pan";
    } else if (state.tool === "ruler") {
      this.drag = "measure";
      this.measure(place, true);
    } else {
      this.drag = "aim";
      this.begin();
      this.aim(place);
    }
    this.buttons = event.buttons;
  }

  moveTo(event) {
    const place = this.placeOf(event);
    const before = this.touches.get(event.pointerId);
    this.point(place);
    if (!before) return;
    if (event.buttons && this.buttons && !(event.buttons & this.buttons)) { // Others are held.
      this.release(event);
      return;
    }
    this.touches.set(event.pointerId, { ...before, ...place });
    const moved = [place.x - before.x, place.y - before.y];
    if (this.drag === "aim") this.aim(place);
    if (this.drag === "pan") this.pan(...moved);
    if (this.drag === "measure") this.measure(place);
    if (this.drag === "window") changeWindow(...moved);
    if (this.drag === "pinch") this.pinch(before, place, event.pointerId);
  }

  // Two fingers: one has moved, the other one stays.
  pinch(before, place, pointerId) {
    const other = this.touches.get([...this.touches.keys()].find((id) => id !== pointerId));
    if (!other) return;
    const distance = (from) => Math.max(1, Math.hypot(from.x - other.x, from.y - other.y));
    this.pan((place.x - before.x) / 2, (place.y - before.y) / 2);
    const middle = { x: (place.x + other.x) / 2, y: (place.y + other.y) / 2 };
    this.zoom(distance(place) / distance(before), middle);
  }

  release(event) {
    this.touches.delete(event.pointerId);
    if (this.touches.size) return;
    this.drag = "";
    this.finish();
  }

  pressKey(event) {
    const { across, up, through } = this.spec;
    const steps = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1],
      ArrowUp: [up, 1], PageDown: [through, -1], PageUp: [through, 1], " ": [across, 0] };
    const [axis, step] = steps[event.key] ?? [null, 0];
    if (axis === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (step) this.go(axis, state.place[axis] + step);
    const voxel = this.crosshair();
    if (state.tool === "ruler") {
      this.measure(geometry.middleOf(this.spec, this.layout(), voxel), !step);
    }
    if (step || event.repeat) return;
    this.begin();
    // A line begins where the key was pressed before, in the same slice.
    const slice = state.place[through];
    if (event.shiftKey && this.keyed?.slice === slice) this.draw(this.keyed.voxel);
    this.keyed = { slice, voxel };
    this.draw(voxel);
    this.finish();
  }

  // Measure from where the ruler was set to a place of the view.
  measure({ x, y }, isStart = false) {
    const { left, top, stepX, stepY, scale } = this.layout();
    const end = [(x - left) / stepX, (y - top) / stepY];
    if (isStart || !this.ruler) this.ruler = end;
    this.parts.ruler.setAttribute("d", `M${this.ruler.join(" ")}L${end.join(" ")}`);
    const [byX, byY] = [(end[0] - this.ruler[0]) * stepX, (end[1] - this.ruler[1]) * stepY];
    set({ measured: Math.hypot(byX, byY) / scale });
  }

  // ---- Strokes

  begin(value = drawnValue()) {
    const { labels, shape } = state;
    if (Number.isNaN(value) || this.stroke || !this.data) return;
    const sent = { plane: this.spec.number, place: this.place, path: [], value, shape,
      radius: this.radius(), within: {} };
    this.stroke = { color: drawing.inkOf(value, labels), sent, version: Infinity,
      frame: this.parts.overlay.getBoundingClientRect(), layout: this.layout() };
  }

  // Draw nothing until the pointer is pressed again.
  cancel() {
    this.drag = "";
    this.stroke = null;
    this.drawInk();
  }

  // Draw a line from the last voxel to this one.
  draw(voxel) {
    const sent = this.stroke?.sent;
    if (sent?.path.length === 0) {
      Object.assign(sent, beginAt(this.placeAt(voxel), this.under(voxel)?.refined));
    }
    sent?.path.push(...voxel);
    this.drawInk();
  }

  // Send the stroke, and move the crosshair to its end. The other planes follow with the result:
  // to draw them twice would delay it.
  async finish() {
    const { stroke, spec } = this;
    this.stroke = null;
    if (!stroke) return;
    this.sent.push(stroke); // It is shown until a plane with it has come.
    const isDrawn = this.send(stroke.sent);
    const end = stroke.sent.path.slice(-2);
    state.place = this.placeAt(geometry.nearest(spec, end));
    this.arrange();
    stroke.version = (await isDrawn) ? state.version : 0;
    if (stroke.version) return;
    this.forgetSent(0);
    set({ place: state.place });
  }

  // Show no longer strokes that a plane of this version has, or that were refused.
  forgetSent(version) {
    this.sent = this.sent.filter((stroke) => stroke.version > version);
    this.drawInk();
  }

  // ---- Drawing

  // Get the present plane and draw it; while one is on its way, only the last further call counts.
  load() {
    const { spec: { through } } = this;
    if (through !== null) {
      this.parts.slider.value = state.place[through];
      this.parts.output.textContent = `${state.place[through] + 1} / ${state.about.grid[through]}`;
    }
    this.isOutdated = true;
    this.loading ??= this.loadNewest();
  }

  async loadNewest() {
    const { spec } = this;
    this.parts.overlay.ariaBusy = "true";
    await null; // Further changes of this moment are loaded with it.
    while (this.isOutdated && !hasEnded()) {
      this.isOutdated = false;
      const { version, number, place } = state;
      const modality = Number(state.modality);
      const image = [number, place[spec.through], modality].join();
      const isKnown = image === this.image;
      const key = `${image},${version}`;
      try {
        if (key !== this.key && number !== state.leaving) {
          const sent = { plane: spec.number, place, modality, is_known: isKnown };
          const query = encodeURIComponent(JSON.stringify(sent));
          const data = await askPlane(`case/${number}/plane/${version}?${query}`);
          this.data = isKnown ? { ...this.data, ...data } : data;
          Object.assign(this, { image, key, place });
          if (!isKnown) this.drawGray();
          this.drawLabels(isKnown);
          this.forgetSent(version);
        }
        this.arrange();
      } catch { /* Another case may be open: its planes come. */ }
    }
    this.loading = null;
    this.parts.overlay.ariaBusy = "false";
  }

  drawGray() {
    if (this.data) drawing.drawGray(this.parts.gray, this.data, state);
  }

  // Draw the lines of groups, which keep their place beside the borders at any zoom.
  drawContours(groups) {
    const { stepX, stepY } = this.layout();
    for (const group of groups) {
      const contours = this.contours[group.classList.value] ?? new Map();
      drawing.drawContours(group, contours, state.labels, [stepX, stepY]);
    }
    this.drawnStep = stepX;
  }

  drawInk() {
    const { parts, place, spec } = this;
    const strokes = [...this.sent, this.stroke].filter(
      (stroke) => stroke && stroke.sent.place[spec.through] === place[spec.through]);
    drawing.drawInk(parts.ink, spec, strokes);
  }

  drawLabels(onlyRefined = false) {
    const { data, parts } = this;
    if (!data) return;
    const { hidden, labels, since } = state;
    const seen = labels.filter(({ label }) => !hidden.has(label));
    const table = drawing.colorTable(seen);
    drawing.drawLabels(parts.fill, data, table);
    drawing.drawLabels(parts.changes, data, table, data[since] ?? data.refined);
    drawing.drawStrokes(parts.drawn, data, drawing.colorTable(labels));
    const groups = findAll(onlyRefined ? ".refined" : "g", parts.contours);
    for (const group of groups) {
      this.contours[group.classList.value] =
        drawing.findContours(data, data[group.classList.value], seen);
    }
    this.drawContours(groups);
    // What is in the box that was refined by itself is provisional.
    const [top, bottom, left, right] = data.frame ?? [0, 0, 0, 0];
    parts.frame.setAttribute("d", `M${left} ${top}H${right}V${bottom}H${left}Z`);
  }
}
