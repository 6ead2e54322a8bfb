// A plane of the case on two canvases: the picture, and over it what follows the pointer.
import { askPlane, hasEnded, make } from "./page.js";
import { set, state } from "./store.js";
import * as brush from "./brush.js";
import * as drawing from "./drawing.js";
import * as geometry from "./geometry.js";

const ZOOM_STEP = 1.25;
const SOLID = { width: 1.8 };
const DASHED = { width: 1.1, dash: [5, 4] };

export class Plane {
  // `spec` describes the plane; `host` draws, enlarges and changes the window: see tune.js.
  constructor(spec, host) {
    /** @type {any} */ this.spec = spec;
    /** @type {any} */ this.host = host;
    /** @type {any} */ this.data = null; // the newest plane, as of `askPlane`
    this.key = ""; // what it shows
    this.shownImage = "";
    this.layers = {};
    /** @type {any} */ this.stroke = null; // that is being drawn
    /** @type {any[]} */ this.sent = []; // strokes that no plane has yet
    this.isLoading = false;
    this.isOutdated = false;
    /** @type {any} */ this.pointer = null;
    /** @type {string|null} */ this.drag = null;
    this.touches = new Map();
    this.picture = make("canvas", { className: "picture", ariaHidden: "true" });
    this.canvas = make("canvas", { className: "overlay", tabIndex: 0, role: "application" });
    this.canvas.ariaLabel = `${spec.name} plane`;
    this.canvas.setAttribute("aria-describedby", "plane-keys");
    const { through } = spec;
    const last = through === null ? 0 : state.about.grid[through] - 1;
    this.slider = make("input", { type: "range", min: 0, max: last, step: 1 });
    this.slider.ariaLabel = `${spec.name} plane, position`;
    this.output = make("output", {});
    this.title = make("button", { type: "button", textContent: spec.name });
    this.title.title = "Show this plane large";
    const caption = make("figcaption", {}, this.title);
    if (through !== null) caption.append(this.slider, this.output);
    this.view = make("div", { className: "view" }, this.picture, this.canvas);
    this.node = make("figure", { className: "plane" }, this.view, caption);
    this.listen();
    this.fit();
    new ResizeObserver(() => this.paint()).observe(this.view);
  }

  // ---- Geometry

  layout() {
    const { clientWidth: width, clientHeight: height } = this.view;
    return geometry.layOut(this.spec, { width, height }, this.pose);
  }

  placeOf(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  voxelAt(place) {
    return geometry.voxelAt(this.spec, this.layout(), place);
  }

  take(pose) {
    this.pose = pose;
    this.paint();
  }

  zoomAt(place, factor) {
    this.take(geometry.zoomed(this.spec, this.layout(), this.pose, place, factor));
  }

  pan(...pixels) {
    this.take(geometry.panned(this.spec, this.layout(), this.pose, pixels));
  }

  zoomByKey(isCloser) {
    const { width, height } = this.layout();
    this.zoomAt({ x: width / 2, y: height / 2 }, isCloser ? ZOOM_STEP : 1 / ZOOM_STEP);
  }

  fit() {
    this.take({ zoom: 1, center: geometry.extentOf(this.spec).map((mm) => mm / 2) });
  }

  // ---- Mouse, pen, fingers, keys

  listen() {
    const { canvas, spec } = this;
    this.title.addEventListener("click", () => this.host.enlarge(this));
    this.slider.addEventListener("input", () => this.go(spec.through, Number(this.slider.value)));
    canvas.addEventListener("wheel", (event) => this.turnWheel(event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.moveTo(event));
    canvas.addEventListener("lostpointercapture", (event) => this.release(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.pressKey(event));
  }

  point(place) {
    this.pointer = place;
    this.paintOver();
    this.host.tellUnder(place && this.under(this.voxelAt(place)));
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

  go(axis, place) {
    const last = state.about.grid[axis] - 1;
    if (!this.stroke) set({ place: state.place.with(axis, geometry.clamp(place, 0, last)) });
  }

  aim(place) {
    const voxel = this.voxelAt(place);
    if (this.stroke) {
      this.draw(voxel);
      return;
    }
    const inside = voxel.map((at, axis) => geometry.clamp(at, 0, this.spec.size[axis] - 1));
    set({ place: this.placeAt(inside) });
  }

  turnWheel(event) {
    const turned = event.deltaY || event.deltaX;
    const { through } = this.spec;
    if (!turned) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey || event.shiftKey) {
      this.zoomAt(this.placeOf(event), Math.exp(-geometry.clamp(turned, -150, 150) / 300));
    } else if (through !== null) {
      this.go(through, state.place[through] + (turned < 0 ? 1 : -1));
    }
  }

  press(event) {
    const place = this.placeOf(event);
    this.canvas.setPointerCapture(event.pointerId);
    if (event.pointerType !== "touch") this.touches.clear(); // Only fingers pinch.
    this.touches.set(event.pointerId, place);
    if (this.touches.size === 2) {
      Object.assign(this, { drag: "pinch", stroke: null }); // The first finger draws nothing.
    } else if (event.button === 2) {
      this.drag = "window";
    } else if (event.button === 1 || event.shiftKey || state.tool.isHand) {
      this.drag = "pan";
    } else {
      this.drag = "aim";
      this.begin();
      this.aim(place);
    }
  }

  moveTo(event) {
    const place = this.placeOf(event);
    const before = this.touches.get(event.pointerId);
    this.point(place);
    if (!before) return;
    this.touches.set(event.pointerId, place);
    const moved = [place.x - before.x, place.y - before.y];
    if (this.drag === "aim") this.aim(place);
    if (this.drag === "pan") this.pan(...moved);
    if (this.drag === "window") this.host.changeWindow(...moved);
    if (this.drag === "pinch") this.pinch(before, place, event.pointerId);
  }

  // Two fingers: one has moved, the other one stays.
  pinch(before, place, pointerId) {
    const other = this.touches.get([...this.touches.keys()].find((id) => id !== pointerId));
    if (!other) return;
    const distance = (from) => Math.max(1, Math.hypot(from.x - other.x, from.y - other.y));
    this.pan((place.x - before.x) / 2, (place.y - before.y) / 2);
    const middle = { x: (place.x + other.x) / 2, y: (place.y + other.y) / 2 };
    this.zoomAt(middle, distance(place) / distance(before));
  }

  release(event) {
    this.touches.delete(event.pointerId);
    if (this.touches.size) return;
    this.drag = null;
    if (event.pointerType === "touch") this.pointer = null;
    this.finish();
  }

  pressKey(event) {
    const { across, up, through } = this.spec;
    const steps = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1],
      ArrowUp: [up, 1], PageDown: [through, -1], PageUp: [through, 1], " ": [across, 0] };
    const [axis, step] = steps[event.key] ?? [null, 0];
    if (axis === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (step) {
      this.go(axis, state.place[axis] + step);
      return;
    }
    this.begin();
    this.draw([state.place[across], state.place[up]]);
    this.finish();
  }

  // ---- Strokes

  begin() {
    const { place, range, shape, size, tool: { color, value } } = state;
    if (value === null || this.stroke || !this.data) return;
    const radius = shape === "outline" ? 0 : brush.radiusOf(this.spec, size);
    this.stroke = { color, value, shape, range, place, radius, points: [], voxels: new Set() };
  }

  // Add a line of the brush, from the last voxel to this one.
  draw(voxel) {
    const { stroke, spec } = this;
    if (!stroke) return;
    for (const point of brush.lineBetween(stroke.points.at(-1) ?? voxel, voxel)) {
      stroke.points.push(point);
      brush.addDisk(stroke.voxels, spec, point, stroke.radius);
    }
    this.paintOver();
  }

  // Send the stroke, and move the crosshair to its end.
  async finish() {
    const { stroke, spec, data } = this;
    this.stroke = null;
    if (!stroke?.voxels.size) return;
    if (stroke.shape === "outline") stroke.voxels = brush.fillOutline(stroke.points, spec);
    const sent = { plane: spec.number, place: stroke.place, value: stroke.value, radius: 0,
      within: stroke.range ? { ...stroke.range, modality: state.modality } : {} };
    if (stroke.shape === "ball") {
      sent.radius = stroke.radius;
      const inside = stroke.points.filter((point) => geometry.isInside(spec, point));
      sent.voxels = inside.map(([x, y]) => x + spec.size[0] * y);
    }
    if (stroke.range) {
      stroke.voxels = brush.limitTo(stroke.voxels, data.image, spec.size, stroke.range);
    }
    sent.voxels ??= [...stroke.voxels];
    const end = sent.voxels.at(-1);
    if (end === undefined) {
      this.host.tellEmpty();
      this.paintOver();
      return;
    }
    this.sent.push(stroke); // It is shown until a plane with it has come.
    set({ place: this.placeAt([end % spec.size[0], Math.floor(end / spec.size[0])]),
      drawnOn: this });
    const isDrawn = await this.host.draw(sent);
    stroke.version = isDrawn ? state.version : 0;
    if (!isDrawn) this.forgetSent(0);
  }

  // Show no longer strokes that a plane of this version has, or that were refused.
  forgetSent(version) {
    this.sent = this.sent.filter((stroke) => !(stroke.version <= version));
    this.paintOver();
  }

  // ---- Drawing

  // Get the present plane and draw it; while one is on its way, only the last further call counts.
  load() {
    const { spec: { through } } = this;
    if (through !== null) {
      this.slider.value = state.place[through];
      this.output.textContent = `${state.place[through] + 1} / ${state.about.grid[through]}`;
    }
    this.isOutdated = true;
    if (!this.isLoading) this.loading = this.loadNewest();
    return this.loading;
  }

  async loadNewest() {
    const { spec } = this;
    this.isLoading = true;
    this.canvas.ariaBusy = "true";
    while (this.isOutdated && !hasEnded()) {
      this.isOutdated = false;
      const { version, number, place, modality } = state;
      const key = [number, version, place[spec.through], modality].join();
      try {
        if (key !== this.key) {
          const sent = JSON.stringify({ plane: spec.number, place, modality });
          const address = `case/${number}/plane/${version}?${encodeURIComponent(sent)}`;
          const image = [number, place[spec.through], modality].join();
          const data = await askPlane(address);
          const layers = image === this.shownImage ? { gray: this.layers.gray } : {};
          Object.assign(this, { data, key, layers, shownImage: image });
          this.forgetSent(version);
        }
        this.paintNow();
      } catch { /* Another case may be open: its planes come. */ }
    }
    this.isLoading = false;
    this.canvas.ariaBusy = "false";
  }

  // Draw before the next frame of the screen.
  paint() {
    this.frame ??= requestAnimationFrame(() => this.paintNow());
  }

  paintOver() {
    this.overFrame ??= requestAnimationFrame(() => this.paintOverNow());
  }

  // What was made of the plane for some settings is kept until one of them changes.
  layer(name, settings, makeLayer) {
    const key = JSON.stringify(settings);
    if (this.layers[name]?.key !== key) this.layers[name] = { key, made: makeLayer() };
    return this.layers[name].made;
  }

  // A cleared canvas of the size of the view, in pixels of the page.
  pen(canvas, layout) {
    const ratio = window.devicePixelRatio;
    const [width, height] = [layout.width, layout.height].map((size) => Math.round(size * ratio));
    if (canvas.width !== width || canvas.height !== height) {
      Object.assign(canvas, { width, height });
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, layout.width, layout.height);
    return pen;
  }

  paintNow() {
    this.frame = null;
    const { data } = this;
    const view = this.layout();
    if (!data || !view.width || !view.height) return;
    const pen = this.pen(this.picture, view);
    const box = [view.left, view.top, data.columns * view.stepX, data.rows * view.stepY];
    pen.imageSmoothingEnabled = state.isSmooth || view.stepX < 1;
    pen.imageSmoothingQuality = "high";
    const gray = this.layer("gray", state.window, () => drawing.grayRaster(data, state.window));
    pen.drawImage(gray, ...box);
    pen.imageSmoothingEnabled = false;
    this.paintLabels(pen, view, box);
    this.paintOverNow();
  }

  paintOverNow() {
    this.overFrame = null;
    const { data, spec } = this;
    const view = this.layout();
    if (!data || !view.width || !view.height) return;
    const pen = this.pen(this.canvas, view);
    for (const ink of [...this.sent, this.stroke]) {
      if (ink) drawing.drawInk(pen, view, spec.size, ink);
    }
    const voxel = [state.place[spec.across], state.place[spec.up]];
    drawing.drawCrosshair(pen, geometry.middleOf(spec, view, voxel), view);
    drawing.drawSides(pen, spec.sides, view);
    const { tool: { color, value }, size, shape } = state;
    const radius = shape === "outline" ? 2 : brush.radiusOf(spec, size) * view.scale;
    if (value !== null && this.pointer) drawing.drawRing(pen, this.pointer, radius, color);
  }

  paintLabels(pen, view, box) {
    const { data } = this;
    const { hidden, labels, opacity, shown, since } = state;
    const hiddenLabels = [...hidden];
    const table = drawing.colorTable(labels, hidden);
    const fill = (name, settings, makeLayer) =>
      pen.drawImage(this.layer(name, [hiddenLabels, settings], makeLayer), ...box);
    if (opacity > 0) {
      fill("fill", opacity, () => drawing.labelRaster(data, data.refined, table, opacity));
    }
    const base = data[since];
    if (base) {
      fill("changes", since, () => drawing.labelRaster(data, data.refined, table, 0.75, base));
    }
    if (shown.has("strokes")) {
      const all = drawing.colorTable(labels, new Set());
      fill("strokes", "", () => drawing.strokeRaster(data, all));
    }
    const contours = (name, style, color) => {
      if (!shown.has(name) || !data[name]) return;
      const makeLayer = () => drawing.contourPaths(data, data[name], table);
      const paths = this.layer(`contours ${name}`, hiddenLabels, makeLayer);
      drawing.strokePaths(pen, paths, view, style, color);
    };
    const ofLabel = (label) => labels[label - 1].color;
    contours("reference", SOLID, () => "#fff");
    contours("network", DASHED, (label) => drawing.paler(ofLabel(label)));
    contours("refined", SOLID, ofLabel);
    if (data.frame) this.paintFrame(pen, view);
  }

  // The box that was refined by itself: what is in it is provisional.
  paintFrame(pen, view) {
    const [top, bottom, left, right] = this.data.frame;
    const corner = [view.left + left * view.stepX, view.top + top * view.stepY];
    pen.setLineDash([6, 4]);
    Object.assign(pen, { strokeStyle: "#fff", lineWidth: 1 });
    pen.strokeRect(...corner, (right - left) * view.stepX, (bottom - top) * view.stepY);
    pen.setLineDash([]);
  }
}
