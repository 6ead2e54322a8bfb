// A plane of the case: fetched as labels and gray values, drawn with sharp contours, and moved through with mouse and keyboard.
const UNKNOWN = 0xffff;
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export function make(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

export class Plane {
  // page: place (a voxel), grid, modality, look (what is drawn), colors (by label), box (the refined frame or null), move(place).
  constructor(spec, page) {
    this.spec = spec;
    this.page = page;
    this.canvas = make("canvas", { tabIndex: 0 });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `${spec.name} plane`);
    this.slider = make("input", { type: "range", min: 0, max: spec.through === null ? 0 : page.grid[spec.through] - 1, step: 1 });
    this.slider.setAttribute("aria-label", `${spec.name} plane, position`);
    this.output = make("output", {});
    const caption = make("figcaption", {}, spec.name);
    if (spec.through !== null) caption.append(this.slider, this.output);
    this.view = make("div", { className: "view" }, this.canvas);
    this.node = make("figure", { className: "plane" }, this.view, caption);
    this.pixels = make("canvas", { width: spec.columns, height: spec.rows });
    this.layers = null;
    this.isLoading = this.isOutdated = false;
    this.listen();
  }

  listen() {
    const { spec, page, canvas } = this;
    this.slider.addEventListener("input", () => this.scrollTo(Number(this.slider.value)));
    canvas.addEventListener("wheel", (event) => {
      if (spec.through === null || event.ctrlKey || !event.deltaY) return;
      event.preventDefault();
      this.scrollTo(page.place[spec.through] + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    const aim = (event) => {
      const box = canvas.getBoundingClientRect(), place = [...page.place];
      place[spec.across] = clamp(Math.floor(((event.clientX - box.left) / box.width) * spec.columns), 0, spec.columns - 1);
      place[spec.up] = spec.rows - 1 - clamp(Math.floor(((event.clientY - box.top) / box.height) * spec.rows), 0, spec.rows - 1);
      page.move(place);
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); aim(event); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) aim(event); });
    canvas.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [spec.across, -1], ArrowRight: [spec.across, 1], ArrowDown: [spec.up, -1], ArrowUp: [spec.up, 1],
        PageDown: [spec.through, -1], PageUp: [spec.through, 1] }[event.key];
      if (!steps || steps[0] === null || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const place = [...page.place];
      place[steps[0]] = clamp(place[steps[0]] + steps[1], 0, page.grid[steps[0]] - 1);
      page.move(place);
    });
  }

  scrollTo(index) {
    const { through } = this.spec, place = [...this.page.place];
    place[through] = clamp(index, 0, this.page.grid[through] - 1);
    this.page.move(place);
  }

  // Fetch what is to be shown now; while an answer is on its way, only the last of further requests counts.
  async load() {
    if (this.isLoading) { this.isOutdated = true; return; }
    this.isLoading = true;
    do {
      this.isOutdated = false;
      const { spec, page } = this, index = spec.through === null ? 0 : page.place[spec.through];
      try {
        const answer = await fetch(`plane?number=${spec.number}&index=${index}&modality=${page.modality}`);
        if (answer.ok) this.take(await answer.arrayBuffer());
      } catch { this.isOutdated = false; }
    } while (this.isOutdated);
    this.isLoading = false;
  }

  take(buffer) {
    const count = this.spec.rows * this.spec.columns;
    if (buffer.byteLength !== 7 * count) return;
    const [network, refined, reference] = [0, 1, 2].map((layer) => new Uint16Array(buffer, 2 * count * layer, count));
    this.layers = { network, refined, reference, gray: new Uint8Array(buffer, 6 * count, count) };
    this.draw();
  }

  draw() {
    const { spec, page, canvas, layers } = this, place = page.place;
    if (spec.through !== null) {
      this.slider.value = place[spec.through];
      this.output.textContent = `${place[spec.through] + 1} / ${page.grid[spec.through]}`;
    }
    if (!layers) return;
    const highest = parseFloat(getComputedStyle(this.view).maxHeight);
    const room = Math.max(80, this.view.clientWidth), perMm = Math.min(room / spec.mm[0], highest / spec.mm[1]);
    const dense = window.devicePixelRatio || 1, width = Math.max(8, Math.floor(spec.mm[0] * perMm)), height = Math.max(8, Math.floor(spec.mm[1] * perMm));
    canvas.width = width * dense;
    canvas.height = height * dense;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    this.paint();
    context.drawImage(this.pixels, 0, 0, canvas.width, canvas.height);
    const scale = [canvas.width / spec.columns, canvas.height / spec.rows];
    if (page.look.reference) this.contours(context, layers.reference, scale, dense * 1, () => "#fff", false);
    if (page.look.refined) this.contours(context, layers.refined, scale, dense * 2, (label) => page.colors[label], false);
    if (page.look.network) {  // Over the refined line and with a dark rim, or its dots would be lost in that line and in a bright image.
      this.contours(context, layers.network, scale, dense * 3.5, () => "#000", true, dense);
      this.contours(context, layers.network, scale, dense * 1.5, (label) => page.colors[label], true, dense);
    }
    this.frame(context, scale, dense);
    this.crosshair(context, scale, dense);
    this.letters(context, dense);
  }

  // Gray values, and over them what changed: in the color of the new label, background white.
  paint() {
    const { network, refined, gray } = this.layers, { look, rgb, hidden } = this.page;
    const context = this.pixels.getContext("2d"), image = context.createImageData(this.spec.columns, this.spec.rows), data = image.data;
    for (let index = 0; index < gray.length; index++) {
      const after = refined[index], before = network[index], level = gray[index];
      const isShown = look.changes && after !== UNKNOWN && after !== before && !(hidden.has(after || before));
      for (let part = 0; part < 3; part++) {
        const color = isShown ? (after ? rgb[after][part] : 255) : level;
        data[4 * index + part] = isShown ? (level + 2 * color) / 3 : level;
      }
      data[4 * index + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  // Lines along the edges of voxels, just inside of their label. Dotted ones leave out every other edge.
  contours(context, labels, [across, down], width, colorOf, isDotted, inside = width / 2) {
    const { columns, rows } = this.spec, { hidden } = this.page, paths = new Map();
    const at = (row, column) => (row < 0 || column < 0 || row >= rows || column >= columns ? 0 : labels[row * columns + column]);
    const add = (label, ...ends) => {
      if (!label || label === UNKNOWN || hidden.has(label)) return;
      if (!paths.has(label)) paths.set(label, new Path2D());
      paths.get(label).moveTo(ends[0], ends[1]);
      paths.get(label).lineTo(ends[2], ends[3]);
    };
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = at(row, column), above = at(row - 1, column), left = at(row, column - 1);
        if (isDotted && (row + column) % 2) continue;
        const x = column * across, y = row * down;
        if (here !== above && here !== UNKNOWN && above !== UNKNOWN) {
          add(here, x, y + inside, x + across, y + inside);
          add(above, x, y - inside, x + across, y - inside);
        }
        if (here !== left && here !== UNKNOWN && left !== UNKNOWN) {
          add(here, x + inside, y, x + inside, y + down);
          add(left, x - inside, y, x - inside, y + down);
        }
      }
    }
    context.lineWidth = width;
    context.lineCap = "butt";
    for (const [label, path] of paths) {
      context.strokeStyle = colorOf(label);
      context.stroke(path);
    }
  }

  frame(context, [across, down], dense) {
    const { box, place } = this.page, { spec } = this;
    if (!box || (spec.through !== null && !(box[spec.through][0] <= place[spec.through] && place[spec.through] < box[spec.through][1]))) return;
    const [left, right] = box[spec.across], [low, high] = box[spec.up];
    context.strokeStyle = "#fff";
    context.lineWidth = dense;
    context.setLineDash([5 * dense, 4 * dense]);
    context.strokeRect(left * across, (spec.rows - high) * down, (right - left) * across, (high - low) * down);
    context.setLineDash([]);
  }

  crosshair(context, [across, down], dense) {
    const { spec, canvas } = this, { place } = this.page, gap = 9 * dense;
    const x = (place[spec.across] + 0.5) * across, y = (spec.rows - place[spec.up] - 0.5) * down;
    context.strokeStyle = "rgb(255 255 255 / .45)";
    context.lineWidth = dense;
    context.beginPath();
    for (const [from, to] of [[0, x - gap], [x + gap, canvas.width]]) { context.moveTo(from, y); context.lineTo(to, y); }
    for (const [from, to] of [[0, y - gap], [y + gap, canvas.height]]) { context.moveTo(x, from); context.lineTo(x, to); }
    context.stroke();
  }

  letters(context, dense) {
    if (!this.spec.sides) return;
    const { width, height } = this.canvas, [[left, right], [low, high]] = this.spec.sides, edge = 9 * dense;
    context.font = `${12 * dense}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3 * dense;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    for (const [letter, x, y] of [[left, edge, height / 2], [right, width - edge, height / 2], [high, width / 2, edge], [low, width / 2, height - edge]]) {
      context.strokeText(letter, x, y);
      context.fillText(letter, x, y);
    }
  }
}
