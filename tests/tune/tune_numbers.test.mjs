// Geometry, contours and requests of the page of `tune`, by `node --test`.
import assert from "node:assert/strict";
import test from "node:test";

const assets = new URL("../../crfrefine/tune/assets/", import.meta.url);
const load = (name) => import(new URL(name, assets));
const geometry = await load("geometry.js");
const { contoursOf } = await load("contours.js");

const GRID = { size: [15, 18], steps: [1, 2.5] };
const VIEW = { width: 400, height: 300 };
const POSE = { zoom: 1, center: geometry.extentOf(GRID).map((mm) => mm / 2) };

test("the voxel at the middle of a voxel is that voxel, at any zoom", () => {
  const layout = geometry.layOut(GRID, VIEW, POSE);
  const pose = geometry.zoomed(GRID, layout, POSE, { x: 210, y: 140 }, 3);
  for (const one of [layout, geometry.layOut(GRID, VIEW, pose)]) {
    for (const voxel of [[0, 0], [14, 17], [3, 9]]) {
      assert.deepEqual(geometry.voxelAt(GRID, one, geometry.middleOf(GRID, one, voxel)), voxel);
    }
  }
});

test("what is under the pointer stays there while it zooms", () => {
  const layout = geometry.layOut(GRID, VIEW, POSE);
  const place = geometry.middleOf(GRID, layout, [5, 11]);
  const pose = geometry.zoomed(GRID, layout, POSE, place, 4);
  const after = geometry.middleOf(GRID, geometry.layOut(GRID, VIEW, pose), [5, 11]);
  assert.ok(Math.hypot(after.x - place.x, after.y - place.y) < 1e-6);
});

// All edges between unlike voxels, by brute force.
function edgesOf(rows, columns, values) {
  const at = (row, column) => {
    if (row < 0 || column < 0 || row >= rows || column >= columns) return 0;
    return values[row * columns + column];
  };
  let edges = 0;
  for (let row = 0; row <= rows; row += 1) {
    for (let column = 0; column <= columns; column += 1) {
      if (column < columns && at(row, column) !== at(row - 1, column)) edges += 1;
      if (row < rows && at(row, column) !== at(row, column - 1)) edges += 1;
    }
  }
  return edges;
}

test("contours have each edge once, in connected lines", () => {
  const [rows, columns] = [13, 17];
  let seed = 7;
  const values = Uint16Array.from({ length: rows * columns }, () => {
    seed = (seed * 48271) % 2147483647;
    return seed % 4;
  });
  const lines = contoursOf({ rows, columns }, values, new Uint8Array(65536).fill(1));
  let edges = 0;
  for (const line of [...lines.values()].flat()) {
    for (let at = 2; at < line.length; at += 2) {
      const step = Math.abs(line[at] - line[at - 2]) + Math.abs(line[at + 1] - line[at - 1]);
      assert.equal(step, 1);
      edges += 1;
    }
  }
  assert.equal(edges, edgesOf(rows, columns, values));
});

test("the contour of a square is one closed line, and hidden labels have none", () => {
  const values = new Uint16Array(36);
  for (const at of [14, 15, 20, 21]) values[at] = 5;
  const isShown = new Uint8Array(65536);
  assert.equal(contoursOf({ rows: 6, columns: 6 }, values, isShown).size, 0);
  isShown[5] = 1;
  const [line, ...others] = contoursOf({ rows: 6, columns: 6 }, values, isShown).get(5);
  assert.equal(others.length, 0);
  assert.equal(line.length, 18);
  assert.deepEqual(line.slice(0, 2), line.slice(-2));
});

test("what is sent arrives if the page is closed at once, unless it is too long", async () => {
  const { send } = await load("page.js");
  const options = [];
  globalThis.document = { body: { dataset: {} }, getElementById: () => ({}) };
  globalThis.fetch = async (_, sent) => {
    options.push(sent);
    return new Response("{}");
  };
  await send("draw", { path: [2, 3] });
  await send("draw", { path: new Array(40_000).fill(1) }); // A browser would refuse to keep it.
  assert.deepEqual(options.map((sent) => sent.keepalive), [true, false]);
  assert.deepEqual(options.map((sent) => sent.method), ["POST", "POST"]);
});
