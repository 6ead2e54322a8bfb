// A plane of the case on a canvas: moved through, enlarged, windowed and drawn on.
import { askPlane, clamp, hasEnded, make } from "./page.js";
import * as drawing from "./drawing.js";

const MAX_ZOOM = 40;
const ZOOM_STEP = 1.25;
const LINE = 1.6; // width of contours in pixels

export class Plane {
  // `page` is the state of the page (see tune.js); `spec` describes the plane.
  constructor(spec, page) {
    Object.assign(this, { spec, page, data: null, key: "", layers: {}, stroke: null, sent: [] });
    Object.assign(this, { isLoading: false, pointer: null, drag: null, touches: new Map() });
    this.extent = spec.size.map((size, axis) => size * spec.steps[axis]); // mm
    this.canvas = make("canvas", { tabIndex: 0, role: "application" });
    this.canvas.ariaLabel = `${spec.name} plane`;
    this.canvas.setAttribute("aria-describedby", "plane-keys");
    const { through } = spec;
    const last = through === null ? 0 : page.grid[through] - 1;
    this.slider = make("input", { type: "range", min: 0, max: last, step: 1 });
    this.slider.ariaLabel = `${spec.name} plane, position`;
    this.output = make("output", {});
    this.title = make("button", { type: "button", textContent: spec.name });
    this.title.title = "Show this plane large";
    const caption = make("figcaption", {}, this.title);
    if (through !== null) caption.append(this.slider, this.output);
    this.view = make("div", { className: "view" }, this.canvas);
    this.node = make("figure", { className: "plane" }, this.view, caption);
    this.listen();
    this.fit();
    new ResizeObserver(() => this.paint()).observe(this.view);
  }

  // ---- Geometry

  // Where the picture lies: the corner of the first voxel, and the size of a voxel, in pixels.
  geometry() {
    const { clientWidth: width, clientHeight: height } = this.view;
    const { center, extent, spec, zoom } = this;
    const scale = zoom * Math.min(width / extent[0], height / extent[1]);
    const [stepX, stepY] = spec.steps.map((step) => step * scale);
    const [left, top] = [width / 2 - center[0] * scale, height / 2 - center[1] * scale];
    return { width, height, left, top, stepX, stepY, scale };
  }

  // The voxel under a place of the screen: across, and up. It may lie outside of the image.
  voxelAt({ x, y }) {
    const { left, top, stepX, stepY } = this.geometry();
    const row = this.spec.size[1] - 1 - Math.floor((y - top) / stepY);
    return [Math.floor((x - left) / stepX), row];
  }

  placeOf(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  zoomAt({ x, y }, factor) {
    const { width, height, scale } = this.geometry();
    const zoom = clamp(this.zoom * factor, 1, MAX_ZOOM);
    const share = 1 / scale - this.zoom / (scale * zoom); // The place stays under the pointer.
    const byMiddle = [x - width / 2, y - height / 2];
    this.center = this.center.map((mm, axis) => mm + byMiddle[axis] * share);
    this.zoom = zoom;
    this.pan(0, 0);
  }

  pan(...pixels) {
    const { scale } = this.geometry();
    const move = (mm, axis) => clamp(mm - pixels[axis] / scale, 0, this.extent[axis]);
    this.center = this.center.map(move);
    this.paint();
  }

  zoomByKey(isCloser) {
    const { width, height } = this.geometry();
    this.zoomAt({ x: width / 2, y: height / 2 }, isCloser ? ZOOM_STEP : 1 / ZOOM_STEP);
  }

  fit() {
    Object.assign(this, { zoom: 1, center: this.extent.map((mm) => mm / 2) });
    this.paint();
  }

  // ---- Mouse, pen, fingers, keys

  listen() {
    const { canvas, page, spec } = this;
    this.title.addEventListener("click", () => page.enlarge(this));
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
    this.paint();
  }

  go(axis, place) {
    const { page } = this;
    if (!this.stroke) page.move(page.place.with(axis, clamp(place, 0, page.grid[axis] - 1)));
  }

  aim(place) {
    const { page, spec } = this;
    const [x, y] = this.voxelAt(place);
    if (this.stroke) {
      this.draw(x, y);
      return;
    }
    const inside = (at, size) => clamp(at, 0, size - 1);
    const [columns, rows] = spec.size;
    const moved = page.place.with(spec.across, inside(x, columns)).with(spec.up, inside(y, rows));
    page.move(moved);
  }

  turnWheel(event) {
    const turned = event.deltaY || event.deltaX;
    const { through } = this.spec;
    if (!turned) return;
    event.preventDefault();
    if (event.ctrlKey || event.metaKey || event.shiftKey) {
      this.zoomAt(this.placeOf(event), Math.exp(-clamp(turned, -150, 150) / 300));
    } else if (through !== null) {
      this.go(through, this.page.place[through] + (turned < 0 ? 1 : -1));
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
    } else if (event.button === 1 || event.shiftKey || this.page.brush().isHand) {
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
    if (this.drag === "window") this.page.changeWindow(...moved);
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
    const { page, spec: { across, up, through } } = this;
    const steps = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1],
      ArrowUp: [up, 1], PageDown: [through, -1], PageUp: [through, 1], " ": [across, 0] };
    const [axis, step] = steps[event.key] ?? [null, 0];
    if (axis === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (step) {
      this.go(axis, page.place[axis] + step);
      return;
    }
    this.begin();
    this.draw(page.place[across], page.place[up]);
    this.finish();
  }

  // ---- Strokes

  begin() {
    const brush = this.page.brush();
    if (brush.value === null || this.stroke) return;
    this.stroke = { ...brush, place: this.page.place, voxels: new Set(), last: null };
  }

  // Add a line of the brush, from the last voxel to this one; its disk is round in mm.
  draw(x, y) {
    const { stroke, spec } = this;
    if (!stroke) return;
    const [columns, rows] = spec.size;
    const radius = (stroke.size / 2) * Math.min(...spec.steps);
    const [wide, high] = spec.steps.map((step) => Math.floor(radius / step));
    const [fromX, fromY] = stroke.last ?? [x, y];
    const steps = Math.max(Math.abs(x - fromX), Math.abs(y - fromY), 1);
    for (let step = 0; step <= steps; step += 1) {
      const middleX = fromX + Math.round(((x - fromX) * step) / steps);
      const middleY = fromY + Math.round(((y - fromY) * step) / steps);
      for (let right = -wide; right <= wide; right += 1) {
        for (let above = -high; above <= high; above += 1) {
          const [column, row] = [middleX + right, middleY + above];
          const isInside = column >= 0 && column < columns && row >= 0 && row < rows;
          const distance = Math.hypot(right * spec.steps[0], above * spec.steps[1]);
          if (isInside && distance <= radius) stroke.voxels.add(column + columns * row);
        }
      }
    }
    stroke.last = [x, y];
    this.paint();
  }

  // Send the stroke, and move the crosshair to its end, around which the case is refined first.
  async finish() {
    const { stroke, page, spec } = this;
    this.stroke = null;
    if (!stroke?.voxels.size) return;
    this.sent.push(stroke); // It is shown until a plane with it has come.
    const { place, value } = stroke;
    const end = [...stroke.voxels].at(-1);
    const [columns] = spec.size;
    const ended = place.with(spec.across, end % columns);
    page.place = ended.with(spec.up, Math.floor(end / columns));
    page.drawnOn = this;
    const isDrawn =
      await page.draw({ plane: spec.number, place, voxels: [...stroke.voxels], value });
    stroke.version = isDrawn ? page.version : 0;
    if (!isDrawn) this.forgetSent(0);
  }

  // Show no longer strokes that a plane of this version has, or that were refused.
  forgetSent(version) {
    this.sent = this.sent.filter((stroke) => !(stroke.version <= version));
    this.paint();
  }

  // ---- Drawing

  // Get the present plane and draw it; while one is on its way, only the last further call counts.
  load() {
    const { spec: { through }, page } = this;
    if (through !== null) {
      this.slider.value = page.place[through];
      this.output.textContent = `${page.place[through] + 1} / ${page.grid[through]}`;
    }
    this.isOutdated = true;
    if (!this.isLoading) this.loading = this.loadNewest();
    return this.loading;
  }

  async loadNewest() {
    const { spec, page } = this;
    this.isLoading = true;
    this.canvas.ariaBusy = "true";
    while (this.isOutdated && !hasEnded()) {
      this.isOutdated = false;
      const { version, number, place, modality } = page;
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

  // What was made of the plane for some settings is kept until one of them changes.
  layer(name, settings, makeLayer) {
    const key = JSON.stringify(settings);
    if (this.layers[name]?.key !== key) this.layers[name] = { key, made: makeLayer() };
    return this.layers[name].made;
  }

  paintNow() {
    this.frame = null;
    const { canvas, data, page, spec } = this;
    const view = this.geometry();
    if (!data || !view.width || !view.height) return;
    const ratio = window.devicePixelRatio;
    const width = Math.round(view.width * ratio);
    const height = Math.round(view.height * ratio);
    if (canvas.width !== width || canvas.height !== height) {
      Object.assign(canvas, { width, height });
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, view.width, view.height);
    const box = [view.left, view.top, data.columns * view.stepX, data.rows * view.stepY];
    pen.imageSmoothingEnabled = this.zoom === 1; // Enlarged voxels stay sharp.
    const gray = this.layer("gray", page.window, () => drawing.grayRaster(data, page.window));
    pen.drawImage(gray, ...box);
    pen.imageSmoothingEnabled = false;
    this.paintLabels(pen, view, box);
    for (const ink of [...this.sent, this.stroke]) if (ink) this.paintInk(pen, view, ink);
    const x = view.left + (page.place[spec.across] + 0.5) * view.stepX;
    const y = view.top + (spec.size[1] - 0.5 - page.place[spec.up]) * view.stepY;
    drawing.drawCrosshair(pen, x, y, view);
    drawing.drawSides(pen, spec.sides, view);
    const { value, size, color } = page.brush();
    const radius = (size / 2) * Math.min(...spec.steps) * view.scale;
    if (value !== null && this.pointer) drawing.drawRing(pen, this.pointer, radius, color);
  }

  paintLabels(pen, view, box) {
    const { data, page } = this;
    const { opacity, since, shown } = page;
    const hidden = [...page.hidden];
    const table = drawing.colorTable(page.labels, page.hidden);
    const fill = (name, settings, makeLayer) =>
      pen.drawImage(this.layer(name, [hidden, settings], makeLayer), ...box);
    if (opacity > 0) {
      fill("fill", opacity, () => drawing.labelRaster(data, data.refined, table, opacity));
    }
    const base = data[since];
    if (base) {
      fill("changes", since, () => drawing.labelRaster(data, data.refined, table, 0.75, base));
    }
    if (shown.has("strokes")) fill("strokes", "", () => drawing.strokeRaster(data, table));
    const contours = (name, color) => {
      if (!shown.has(name) || !data[name]) return;
      const makeLayer = () => drawing.contourPaths(data, data[name], table, name === "network");
      const paths = this.layer(`contours ${name}`, hidden, makeLayer);
      drawing.strokePaths(pen, paths, view, LINE, color);
    };
    const ofLabel = (label) => page.labels[label - 1].color;
    contours("reference", () => "#fff");
    this.clipped(pen, view, () => contours("refined", ofLabel));
    contours("network", ofLabel);
  }

  // Draw inside of the box that was refined by itself, if any; a frame says that it is provisional.
  clipped(pen, view, drawInside) {
    if (!this.data.frame) {
      drawInside();
      return;
    }
    const [top, bottom, left, right] = this.data.frame;
    const corner = [view.left + left * view.stepX, view.top + top * view.stepY];
    const box = new Path2D();
    box.rect(...corner, (right - left) * view.stepX, (bottom - top) * view.stepY);
    pen.save();
    pen.clip(box);
    drawInside();
    pen.restore();
    pen.setLineDash([6, 4]);
    Object.assign(pen, { strokeStyle: "#fff", lineWidth: 1 });
    pen.stroke(box);
    pen.setLineDash([]);
  }

  paintInk(pen, { left, top, stepX, stepY }, ink) {
    const [columns, rows] = this.spec.size;
    pen.fillStyle = ink.color;
    for (const voxel of ink.voxels) {
      const row = rows - 1 - Math.floor(voxel / columns);
      const place = [left + (voxel % columns) * stepX, top + row * stepY];
      pen.fillRect(...place, Math.ceil(stepX), Math.ceil(stepY));
    }
  }
}
