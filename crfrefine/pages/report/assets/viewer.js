// A case's viewer: brainsprite cuts the planes out of the sprites and paints filled areas; this script puts them on the page, with sliders,
// gray values by modality and window, zoom, the patient's sides and sharp outlines.
(function () {
  "use strict";
  const specs = JSON.parse(document.getElementById("viewer-specs").textContent);
  // Axis through the plane, across it and up it; brainsprite calls the axes X, Y and Z.
  const PLANES = [["axial", 2, 0, 1], ["coronal", 1, 0, 2], ["sagittal", 0, 1, 2]];
  const AXES = ["X", "Y", "Z"], SIDES = ["RL", "PA", "IS"];
  const SVG = document.createElementNS.bind(document, document.querySelector("svg.cut").namespaceURI);

  function make(tag, attributes, ...children) {
    const node = Object.assign(document.createElement(tag), attributes);
    node.append(...children);
    return node;
  }

  // The colors of a sprite's voxels as numbers (zero: no color), looked up by position in the volume.
  function readSprite(picture, [, numY, numZ]) {
    const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const codes = new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    const columns = canvas.width / numY;
    return ([x, y, z]) => codes[(Math.floor(x / columns) * numZ + numZ - 1 - z) * canvas.width + (x % columns) * numY + y];
  }

  // The gray levels of a sprite: the red part of each pixel.
  function readLevels(picture) {
    const canvas = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const colors = context.getImageData(0, 0, canvas.width, canvas.height).data, found = new Uint8Array(colors.length / 4);
    for (let index = 0; index < found.length; index++) found[index] = colors[4 * index];
    return found;
  }

  // A slider with its name and its value, and a function that shows a value.
  function slider(name, title, attributes, onInput) {
    const input = make("input", { type: "range", name, step: "any", ...attributes }), output = make("output", {});
    input.setAttribute("aria-label", title);
    input.addEventListener("input", () => onInput(Number(input.value)));
    const show = (value, text) => {
      input.value = value;
      output.textContent = text;
      input.setAttribute("aria-valuetext", text);
    };
    return { node: make("label", { title }, name, " ", input, " ", output), input, show };
  }

  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const inWords = (value) => String(Number(value.toPrecision(3))).replace("-", "\u2212");

  // The outline of each color in a plane, along the edges of its voxels: colors and paths. Edges are grouped by the color at their right.
  function outlines(codeAt, shape, place, [, through, across, up]) {
    const columns = shape[across], rows = shape[up], width = columns + 1, edges = new Map(), index = [0, 0, 0];
    index[through] = place;
    const at = (row, column) => {
      if (row < 0 || column < 0 || row >= rows || column >= columns) return 0;
      index[across] = column;
      index[up] = rows - 1 - row;
      return codeAt(index);
    };
    const add = (code, from, to) => {
      if (!code) return;
      if (!edges.has(code)) edges.set(code, new Map());
      const ends = edges.get(code);
      if (ends.has(from)) ends.get(from).push(to);
      else ends.set(from, [to]);
    };
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = at(row, column), above = at(row - 1, column), left = at(row, column - 1), corner = row * width + column;
        if (here !== above) { add(here, corner, corner + 1); add(above, corner + 1, corner); }
        if (here !== left) { add(here, corner + width, corner); add(left, corner, corner + width); }
      }
    }
    return [...edges].map(([code, ends]) => [`rgb(${code & 255},${(code >> 8) & 255},${(code >> 16) & 255})`, loops(ends, width)]);
  }

  // Join edges into closed lines: dashes would otherwise restart at each edge.
  function loops(edges, width) {
    let path = "";
    for (const [start, ends] of edges) {
      while (ends.length) {
        let from = start;
        path += `M${start % width} ${Math.floor(start / width)}`;
        do {
          const to = edges.get(from).pop(), step = to - from;
          path += step === 1 ? "h1" : step === -1 ? "h-1" : step > 0 ? "v1" : "v-1";
          from = to;
        } while (from !== start);
      }
    }
    return path;
  }

  async function open(box) {
    const number = box.dataset.case, spec = specs[number];
    const backstage = make("div", { className: "backstage" });
    backstage.append(box.querySelector("template").content.cloneNode(true));
    const pictures = [...backstage.querySelectorAll(".sprite-image")];
    const image = make("canvas", { id: `viewer-${number}-image` });
    const stage = make("canvas", { id: `viewer-${number}-stage` });
    const overlay = make("canvas", { id: `viewer-${number}-overlay` });
    backstage.append(make("div", {}, stage), image, overlay);
    box.append(backstage);
    await Promise.all(Array.from(backstage.querySelectorAll("img"), (picture) => picture.decode()));
    image.width = overlay.width = pictures[0].naturalWidth;
    image.height = overlay.height = pictures[0].naturalHeight;
    const nbSlice = { X: spec.shape[0], Y: spec.shape[1], Z: spec.shape[2] };
    const numSlice = { X: spec.point[0], Y: spec.point[1], Z: spec.point[2] };
    const brain = brainsprite({
      canvas: stage.id, sprite: image.id, nbSlice, numSlice, colorCrosshair: "#FFFFFF", sizeCrosshair: 1, showLR: false,
      nanValue: true, // do not read a value back from the overlay at each step
      overlay: { sprite: overlay.id, nbSlice, opacity: 0.6 },
    });
    const isOn = (name) => box.querySelector(`input[name="${name}"]`).checked;
    const overlays = Array.from(backstage.querySelectorAll("img[data-overlay]"), (picture) => {
      const name = picture.dataset.overlay;
      return { name, picture, codeAt: name === "changes" ? null : readSprite(picture, spec.shape) };
    });
    const planes = PLANES.map(([name, through, across, up]) => {
      const picture = make("div", { className: "picture" });
      const width = spec.shape[across] * spec.steps[across], height = spec.shape[up] * spec.steps[up];
      picture.style.aspectRatio = `${width} / ${height}`;
      picture.style.maxWidth = `${26 * Math.min(1, width / height)}rem`;
      const drawing = SVG("svg");
      drawing.setAttribute("viewBox", `0 0 ${spec.shape[across]} ${spec.shape[up]}`);
      drawing.setAttribute("preserveAspectRatio", "none");
      drawing.setAttribute("aria-hidden", "true");
      const content = make("div", { className: "content" }, drawing); // larger than the picture when zoomed
      picture.append(content);
      const places = [["left:3px;top:45%", SIDES[across][0]], ["right:3px;top:45%", SIDES[across][1]],
        ["bottom:3px;left:48%", SIDES[up][0]], ["top:3px;left:48%", SIDES[up][1]]];
      picture.append(...places.map(([style, letter]) => {
        const node = make("span", { className: "letter", textContent: letter, ariaHidden: "true" });
        node.style.cssText = style;
        return node;
      }));
      const slider = make("input", { type: "range", min: 1, max: spec.shape[through], value: spec.point[through] + 1 });
      slider.setAttribute("aria-label", `${name} slice, from ${SIDES[through][0]} to ${SIDES[through][1]}`);
      const output = make("output", {});
      const move = (place) => {
        brain.numSlice[AXES[through]] = Math.max(0, Math.min(spec.shape[through] - 1, place));
        draw();
      };
      slider.addEventListener("input", () => move(Number(slider.value) - 1));
      picture.addEventListener("wheel", (event) => {
        event.preventDefault();
        if (event.ctrlKey) { zoomTo(zoom * (event.deltaY > 0 ? 1 / 1.25 : 1.25)); return; } // also two fingers on a touchpad
        move(brain.numSlice[AXES[through]] + (event.deltaY > 0 ? -1 : 1));
      }, { passive: false });
      const point = (event) => {
        if (event.type === "pointerdown") picture.setPointerCapture(event.pointerId); // a drag continues beyond the edge
        if (event.buttons & 2 || (event.buttons & 1 && event.shiftKey)) {
          if (event.type === "pointermove") stretch(event.movementX, event.movementY);
          return;
        }
        if (!(event.buttons & 1)) return;
        const area = content.getBoundingClientRect();
        const place = (axis, share) => Math.max(0, Math.min(spec.shape[axis] - 1, Math.floor(share * spec.shape[axis])));
        brain.numSlice[AXES[across]] = place(across, (event.clientX - area.left) / area.width);
        brain.numSlice[AXES[up]] = place(up, 1 - (event.clientY - area.top) / area.height);
        draw();
      };
      picture.addEventListener("pointerdown", point);
      picture.addEventListener("pointermove", point);
      picture.addEventListener("contextmenu", (event) => event.preventDefault()); // the right button sets the window
      const figure = make("figure", { className: "plane" }, picture, make("label", {}, name, slider, output));
      figure.dataset.plane = name;
      figure.hidden = [across, up].some((axis) => spec.shape[axis] === 1) && through !== spec.shape.indexOf(1);
      box.querySelector(".planes").append(figure);
      return { content, slider, output, through, across, up, drawing, left: 0, top: 0 };
    });

    // Gray values: a table from the levels of the sprite to those of the screen.
    const modalities = spec.modalities, levels = new Map();
    let shown = spec.modality, low = 0, high = 1, zoom = 1;
    // Smallest and largest value of black and white: those of the image and of its usual windows.
    const range = () => {
      const { levels: values, windows } = modalities[shown];
      return [Math.min(values[0], ...windows.map(([, black]) => black)), Math.max(values.at(-1), ...windows.map(([, , white]) => white))];
    };
    function shade() {
      const context = image.getContext("2d");
      if (!modalities.length) { context.drawImage(pictures[0], 0, 0); return; }
      if (!levels.has(shown)) levels.set(shown, readLevels(pictures[shown]));
      const grays = new Uint32Array(256);
      modalities[shown].levels.forEach((value, level) => {
        grays[level] = 0xff000000 + 0x010101 * clamp(Math.round(((value - low) / (high - low)) * 255), 0, 255);
      });
      const shades = context.createImageData(image.width, image.height), codes = levels.get(shown);
      const target = new Uint32Array(shades.data.buffer);
      for (let index = 0; index < codes.length; index++) target[index] = grays[codes[index]];
      context.putImageData(shades, 0, 0);
    }
    function setWindow(level, width) {
      const [first, last] = range(), span = last - first;
      width = clamp(width, span / 200, span);
      level = clamp(level, first, last);
      low = level - width / 2;
      high = level + width / 2;
      levelSlider.show(level, inWords(level));
      widthSlider.show(width, inWords(width));
      shade();
      compose();
    }
    function chooseModality(place) {
      shown = place;
      const { windows } = modalities[shown], [first, last] = range();
      Object.assign(levelSlider.input, { min: first, max: last });
      Object.assign(widthSlider.input, { min: (last - first) / 200, max: last - first });
      windowChoice.replaceChildren(...windows.map(([name], index) => new Option(name || "usual", index)));
      chooseWindow(0);
    }
    function chooseWindow(place) {
      const [, black, white] = modalities[shown].windows[place];
      windowChoice.value = place;
      setWindow((black + white) / 2, white - black);
    }
    // Like radiologists' viewers: up is brighter, right is softer.
    function stretch(right, down) {
      if (modalities.length) setWindow((low + high) / 2 + ((high - low) * down) / 300, (high - low) * Math.exp(right / 200));
    }
    function zoomTo(value) {
      const before = zoom;
      zoom = clamp(value, 1, 8);
      for (const plane of planes) { // the chosen voxel stays where it is
        const [x, y] = shareOf(plane);
        plane.left = x - ((x - plane.left) * before) / zoom;
        plane.top = y - ((y - plane.top) * before) / zoom;
      }
      zoomSlider.show(zoom, `${inWords(zoom)}×`);
      draw();
    }
    // Where the chosen voxel lies in a plane, as shares of its width and height.
    const shareOf = ({ across, up }) => [
      (brain.numSlice[AXES[across]] + 0.5) / spec.shape[across], 1 - (brain.numSlice[AXES[up]] + 0.5) / spec.shape[up]];
    // Move the enlarged plane no more than needed to show the chosen voxel.
    function scroll(plane) {
      const seen = 1 / zoom, margin = 0.1 * seen;
      [plane.left, plane.top] = shareOf(plane).map((share, axis) =>
        clamp(clamp(axis ? plane.top : plane.left, share - seen + margin, share - margin), 0, 1 - seen));
      Object.assign(plane.content.style, {
        width: `${100 * zoom}%`, height: `${100 * zoom}%`, left: `${-100 * zoom * plane.left}%`, top: `${-100 * zoom * plane.top}%` });
    }
    function goTo(place) {
      AXES.forEach((name, axis) => { brain.numSlice[name] = place[axis]; });
      draw();
    }

    const modalityChoice = make("select", { name: "modality" }, ...modalities.map(({ name }, place) => new Option(name, place)));
    const windowChoice = make("select", { name: "window" });
    const levelSlider = slider("level", "Level: the intensity that is shown as middle gray", {}, (value) => setWindow(value, high - low));
    const widthSlider = slider("width", "Width: the range of intensities from black to white", {},
      (value) => setWindow((low + high) / 2, value));
    const zoomSlider = slider("zoom", "Zoom", { min: 1, max: 8, step: 0.25 }, zoomTo);
    const button = (name, onClick) => {
      const node = make("button", { type: "button", textContent: name });
      node.addEventListener("click", onClick);
      return node;
    };
    modalityChoice.value = shown;
    modalityChoice.addEventListener("input", () => chooseModality(Number(modalityChoice.value)));
    windowChoice.addEventListener("input", () => chooseWindow(Number(windowChoice.value)));
    const view = make("fieldset", { className: "view" }, make("legend", { textContent: "View" }));
    if (modalities.length > 1) view.append(make("label", {}, "modality ", modalityChoice));
    if (modalities.some(({ windows }) => windows.length > 1)) view.append(make("label", {}, "window ", windowChoice));
    if (modalities.length) view.append(levelSlider.node, widthSlider.node);
    view.append(zoomSlider.node);
    if (spec.change) view.append(button("structure", () => goTo(spec.point)), button("largest change", () => goTo(spec.change)));
    view.append(button("reset", () => {
      if (modalities.length) chooseWindow(0);
      zoomTo(1);
      goTo(spec.point);
    }));
    box.querySelector(".planes").before(view);

    function draw() {
      brain.drawAll();
      planes.forEach((plane, number) => {
        const place = brain.numSlice[AXES[plane.through]];
        plane.slider.value = place + 1;
        const [first, step, size] = spec.counting[plane.through]; // as other viewers count the file's voxels
        plane.output.textContent = `${first + step * place} of ${size}`;
        plane.slider.setAttribute("aria-valuetext", plane.output.textContent);
        scroll(plane);
        plane.drawing.replaceChildren();
        for (const { name, codeAt } of overlays) {
          if (!codeAt || !isOn(name) || isOn("filled")) continue;
          for (const [color, path] of outlines(codeAt, spec.shape, place, PLANES[number])) {
            const node = SVG("path");
            node.setAttribute("d", path);
            node.setAttribute("stroke", color);
            node.setAttribute("class", `contour ${name}`);
            plane.drawing.append(node);
          }
        }
      });
    }

    function compose() {
      const context = overlay.getContext("2d");
      context.clearRect(0, 0, overlay.width, overlay.height);
      for (const { name, picture, codeAt } of overlays) if (isOn(name) && (!codeAt || isOn("filled"))) context.drawImage(picture, 0, 0);
      brain.overlay.opacity = Number(box.querySelector('input[name="opacity"]').value) / 100;
      brain.crosshair = isOn("crosshair");
      brain.init(); // paints image and overlay into one, and recreates the canvases of the planes
      const canvases = { axial: brain.planes.canvasZ, coronal: brain.planes.canvasY, sagittal: brain.planes.canvasX };
      planes.forEach((plane, index) => {
        const name = PLANES[index][0], canvas = canvases[name];
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `${name} plane`);
        plane.content.querySelector("canvas")?.remove();
        plane.content.prepend(canvas);
      });
      draw();
    }

    const controls = box.querySelector("fieldset");
    controls.addEventListener("input", compose);
    zoomSlider.show(1, "1×");
    if (modalities.length) chooseModality(shown);
    else { shade(); compose(); }
    box.dataset.ready = "true";
    box.addEventListener("toggle", () => { // when closed, free the memory: phones have little
      controls.removeEventListener("input", compose);
      for (const canvas of [stage, image, overlay, brain.planes.canvasMaster]) canvas.width = canvas.height = 0;
      box.querySelector(".planes").replaceChildren();
      view.remove();
      backstage.remove();
      delete box.dataset.ready;
      delete box.dataset.opening;
    }, { once: true });
  }

  for (const box of document.querySelectorAll("details.viewer")) {
    box.addEventListener("toggle", () => {
      if (!box.open || box.dataset.opening) return;
      box.dataset.opening = "true";
      open(box).catch((error) => { box.querySelector(".planes").textContent = `The viewer cannot be shown here: ${error.message}`; });
    });
  }
})();
