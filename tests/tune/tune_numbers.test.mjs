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

// All edges of voxels of a label that the next voxel has not, by brute force.
function edgesOf(rows, columns, values, label) {
  const has = (row, column) =>
    row >= 0 && column >= 0 && row < rows && column < columns
    && values[row * columns + column] === label;
  let edges = 0;
  for (let row = 0; row <= rows; row += 1) {
    for (let column = 0; column <= columns; column += 1) {
      if (has(row, column) !== has(row - 1, column)) edges += 1;
      if (has(row, column) !== has(row, column - 1)) edges += 1;
    }
  }
  return edges;
}

test("each label has closed lines of its own along all of its edges, at its side", () => {
  const [rows, columns] = [13, 17];
  let seed = 7;
  const values = Uint16Array.from({ length: rows * columns }, () => {
    seed = (seed * 48271) % 2147483647;
    return seed % 4;
  });
  const all = contoursOf({ rows, columns }, values, new Uint8Array(65536).fill(1));
  assert.deepEqual([...all.keys()].sort(), [1, 2, 3]);
  for (const [label, lines] of all) {
    let edges = 0;
    for (const line of lines) {
      for (let at = 0; at < line.length; at += 4) {
        const [x, y, inX, inY] = line.slice(at, at + 4);
        const [nextX, nextY] = [...line, ...line].slice(at + 4, at + 6);
        assert.ok((x === nextX) !== (y === nextY), "a straight line to the next corner");
        edges += Math.abs(x - nextX) + Math.abs(y - nextY);
        // The voxels at the line: inside is the one that both corners point to.
        const along = [Math.sign(nextX - x), Math.sign(nextY - y)];
        const [column, row] = [x + along[0] / 2 - along[1] / 2, y + along[1] / 2 + along[0] / 2];
        assert.equal(values[Math.floor(row) * columns + Math.floor(column)], label);
        assert.deepEqual([Math.abs(inX), Math.abs(inY)], [1, 1]);
        assert.equal(inX * -along[1] + inY * along[0], 1, "inwards is to the label");
      }
    }
    assert.equal(edges, edgesOf(rows, columns, values, label));
  }
});

test("the contour of a square is one line of four corners, and hidden labels have none", () => {
  const values = new Uint16Array(36);
  for (const at of [14, 15, 20, 21]) values[at] = 5;
  const isShown = new Uint8Array(65536);
  assert.equal(contoursOf({ rows: 6, columns: 6 }, values, isShown).size, 0);
  isShown[5] = 1;
  const lines = contoursOf({ rows: 6, columns: 6 }, values, isShown).get(5);
  assert.deepEqual(lines, [[4, 2, -1, 1, 4, 4, -1, -1, 2, 4, 1, -1, 2, 2, 1, 1]]);
});

test("what is sent arrives if the page is closed at once, unless it is too long", async () => {
  const { send } = await load("sending.js");
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
