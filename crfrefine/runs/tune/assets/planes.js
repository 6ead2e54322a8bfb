// A plane of the case: a picture that the server draws, moved through with mouse and keyboard.
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export function make(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

export class Plane {
  // page: place (a voxel), grid, modality, shown (names of what is drawn), hidden (labels), move(place),
  // version (of the labels: browsers keep a picture of the same address), hasEnded (the server may be gone: ask nothing).
  constructor(spec, page) {
    Object.assign(this, { spec, page, isLoading: false, isOutdated: false });
    this.image = make("img", { tabIndex: 0, alt: `${spec.name} plane`, draggable: false });
    this.slider = make("input", { type: "range", min: 0, max: spec.through === null ? 0 : page.grid[spec.through] - 1, step: 1 });
    this.slider.setAttribute("aria-label", `${spec.name} plane, position`);
    this.output = make("output", {});
    const caption = make("figcaption", {}, spec.name);
    if (spec.through !== null) caption.append(this.slider, this.output);
    this.view = make("div", { className: "view" }, this.image);
    this.node = make("figure", { className: "plane" }, this.view, caption);
    this.listen();
  }

  listen() {
    const { spec, page, image } = this, { across, up, through } = spec;
    const go = (axis, place) => page.move(page.place.with(axis, clamp(place, 0, page.grid[axis] - 1)));
    const aim = (event) => {
      const box = image.getBoundingClientRect(), { grid } = page;
      go(across, Math.floor(((event.clientX - box.left) / box.width) * grid[across]));
      go(up, grid[up] - 1 - Math.floor(((event.clientY - box.top) / box.height) * grid[up]));
    };
    this.slider.addEventListener("input", () => go(through, Number(this.slider.value)));
    image.addEventListener("wheel", (event) => {
      if (through === null || event.ctrlKey || !event.deltaY) return;
      event.preventDefault();
      go(through, page.place[through] + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    image.addEventListener("pointerdown", (event) => { image.setPointerCapture(event.pointerId); aim(event); });
    image.addEventListener("pointermove", (event) => { if (event.buttons & 1) aim(event); });
    image.addEventListener("keydown", (event) => {
      const [axis, step] = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1], ArrowUp: [up, 1],
        PageDown: [through, -1], PageUp: [through, 1] }[event.key] ?? [null];
      if (axis === null || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      go(axis, page.place[axis] + step);
    });
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
      const perMm = Math.min(Math.max(80, view.clientWidth) / spec.mm[0], parseFloat(getComputedStyle(view).maxHeight) / spec.mm[1]);
      const css = spec.mm.map((mm) => Math.max(8, Math.floor(mm * perMm)));
      const sent = { plane: spec.number, place: page.place, modality: page.modality, size: css.map((pixels) => 2 * pixels),
        shown: [...page.shown], hidden: [...page.hidden] };
      const next = make("img", { src: `plane/${page.version}?${encodeURIComponent(JSON.stringify(sent))}` });
      try {
        await next.decode();
        if (page.hasEnded) break;
        Object.assign(image, { src: next.src, width: css[0], height: css[1] });
        await image.decode();
      } catch { /* The next picture may come. */ }
    }
    this.isLoading = false;
    image.ariaBusy = "false";
  }
}
