// A plane of the case: a picture that the server draws, moved through and drawn on with mouse, finger, pen and keyboard.
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export function make(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

export class Plane {
  // page: place (a voxel), grid, modality, shown (names of what is drawn), hidden (labels), move(place),
  // version (of the labels: browsers keep a picture of the same address), hasEnded (the server may be gone: ask nothing),
  // drawn (the plane to show first, or null),
  // brush() (value, null for none, color and size), spacing, draw(stroke) (promises whether labels are refined with it).
  constructor(spec, page) {
    Object.assign(this, { spec, page, isLoading: false, isOutdated: false, stroke: null, drawnAt: 0 });
    this.image = make("img", { tabIndex: 0, alt: `${spec.name} plane`, draggable: false });
    this.slider = make("input", { type: "range", min: 0, max: spec.through === null ? 0 : page.grid[spec.through] - 1, step: 1 });
    this.slider.setAttribute("aria-label", `${spec.name} plane, position`);
    this.output = make("output", {});
    const caption = make("figcaption", {}, spec.name);
    if (spec.through !== null) caption.append(this.slider, this.output);
    this.canvas = make("canvas", { width: page.grid[spec.across], height: page.grid[spec.up] });  // Shows a stroke until a picture does.
    this.view = make("div", { className: "view" }, this.image, this.canvas);
    this.node = make("figure", { className: "plane" }, this.view, caption);
    this.listen();
  }

  listen() {
    const { spec, page, image } = this, { across, up, through } = spec;
    const go = (axis, place) => { if (!this.stroke) page.move(page.place.with(axis, clamp(place, 0, page.grid[axis] - 1))); };
    const aim = (event) => {
      const box = image.getBoundingClientRect(), shares = [(event.clientX - box.left) / box.width, (box.bottom - event.clientY) / box.height];
      const [x, y] = [across, up].map((axis, which) => clamp(Math.floor(shares[which] * page.grid[axis]), 0, page.grid[axis] - 1));
      if (this.stroke) this.paint(x, y);
      else page.move(page.place.with(across, x).with(up, y));
    };
    const begin = () => { if (page.brush().value !== null) this.stroke ??= { ...page.brush(), place: page.place, voxels: new Set(), last: null }; };
    this.slider.addEventListener("input", () => go(through, Number(this.slider.value)));
    image.addEventListener("wheel", (event) => {
      if (through === null || event.ctrlKey || !event.deltaY) return;
      event.preventDefault();
      go(through, page.place[through] + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    image.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary || event.button) return;
      image.setPointerCapture(event.pointerId);
      begin();
      aim(event);
    });
    image.addEventListener("pointermove", (event) => { if (image.hasPointerCapture(event.pointerId)) aim(event); });
    image.addEventListener("lostpointercapture", () => this.finish());
    image.addEventListener("keydown", (event) => {
      const [axis, step] = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1], ArrowUp: [up, 1],
        PageDown: [through, -1], PageUp: [through, 1], " ": [across, 0] }[event.key] ?? [null];
      if (axis === null || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      if (step) return go(axis, page.place[axis] + step);
      begin();
      this.paint(page.place[across], page.place[up]);
      this.finish();
    });
  }

  // Add a line of the brush, from the last voxel to this one; its disk is round in mm.
  paint(x, y) {
    const { stroke, canvas, page, spec: { across, up } } = this;
    if (!stroke) return;
    const mm = [page.spacing[across], page.spacing[up]], radius = (stroke.size / 2) * Math.min(...mm), pen = canvas.getContext("2d");
    const [wide, high] = mm.map((length) => Math.floor(radius / length)), [fromX, fromY] = stroke.last ?? [x, y];
    const steps = Math.max(Math.abs(x - fromX), Math.abs(y - fromY), 1);
    pen.fillStyle = stroke.color;
    for (let step = 0; step <= steps; step += 1) for (let right = -wide; right <= wide; right += 1) for (let above = -high; above <= high; above += 1) {
      const column = fromX + Math.round(((x - fromX) * step) / steps) + right, row = fromY + Math.round(((y - fromY) * step) / steps) + above;
      const isInside = column === clamp(column, 0, canvas.width - 1) && row === clamp(row, 0, canvas.height - 1);
      if (!isInside || Math.hypot(right * mm[0], above * mm[1]) > radius) continue;
      stroke.voxels.add(column + canvas.width * row);
      pen.fillRect(column, canvas.height - 1 - row, 1, 1);
    }
    stroke.last = [x, y];
  }

  // Send the stroke, and move the crosshair to its end, around which the case is refined first.
  async finish() {
    const { stroke, page, spec } = this;
    if (!stroke) return;
    page.place = stroke.place.with(spec.across, stroke.last[0]).with(spec.up, stroke.last[1]);
    Object.assign(this, { stroke: null, drawnAt: Infinity });
    page.drawn = this;
    const isRefined = await page.draw({ plane: spec.number, place: stroke.place, voxels: [...stroke.voxels], value: stroke.value });
    this.drawnAt = page.version;
    if (!isRefined) page.move(page.place);  // Else the refined labels bring new pictures; earlier ones would delay them.
  }

  // Fetch the present picture; while one is on its way, only the last of further calls counts.
  async draw() {
    const { spec, page, view, image } = this, { place } = page;
    if (spec.through !== null) {
      this.slider.value = place[spec.through];
      this.output.textContent = `${place[spec.through] + 1} / ${page.grid[spec.through]}`;
    }
    this.isOutdated = true;
    if (this.isLoading) return;
    this.isLoading = true;
    image.ariaBusy = "true";
    while (this.isOutdated && !page.hasEnded) {
      this.isOutdated = false;
      const { version } = page;
      const perMm = Math.min(Math.max(80, view.clientWidth) / spec.mm[0], parseFloat(getComputedStyle(view).maxHeight) / spec.mm[1]);
      const css = spec.mm.map((mm) => Math.max(8, Math.floor(mm * perMm)));
      const sent = { plane: spec.number, place: page.place, modality: page.modality, size: css.map((pixels) => 2 * pixels),
        shown: [...page.shown], hidden: [...page.hidden] };
      const next = make("img", { src: `plane/${version}?${encodeURIComponent(JSON.stringify(sent))}` });
      try {
        await next.decode();
        if (page.hasEnded) break;
        Object.assign(image, { src: next.src, width: css[0], height: css[1] });
        this.canvas.style = `width: ${css[0]}px; height: ${css[1]}px`;
        await image.decode();
        if (!this.stroke && version >= this.drawnAt) this.canvas.getContext("2d").reset();
      } catch { /* The next picture may come. */ }
    }
    this.isLoading = false;
    image.ariaBusy = "false";
  }
}
