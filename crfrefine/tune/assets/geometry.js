// Where a plane lies on the screen. Only numbers: node tests it without a browser.

/** @typedef {{size: number[], steps: number[]}} Grid voxels and mm of a plane, across and up */
/** @typedef {{zoom: number, center: number[]}} Pose `center` is the mm in the middle of the view */

export const MAX_ZOOM = 40;
export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
export const extentOf = ({ size, steps }) => size.map((number, axis) => number * steps[axis]);

// The corner of the first voxel, and the size of a voxel and of a mm, in pixels.
export function layOut(/** @type {Grid} */ grid, { width, height }, /** @type {Pose} */ pose) {
  const extent = extentOf(grid);
  const scale = pose.zoom * Math.min(width / extent[0], height / extent[1]);
  const [stepX, stepY] = grid.steps.map((step) => step * scale);
  const [left, top] = [width / 2 - pose.center[0] * scale, height / 2 - pose.center[1] * scale];
  return { width, height, left, top, stepX, stepY, scale };
}

// The voxel under a place of the screen, across and up. It may lie outside of the image.
export function voxelAt({ size }, { left, top, stepX, stepY }, { x, y }) {
  return [Math.floor((x - left) / stepX), size[1] - 1 - Math.floor((y - top) / stepY)];
}

export const isInside = ({ size }, voxel) =>
  voxel.every((at, axis) => at >= 0 && at < size[axis]);

export const nearest = ({ size }, voxel) =>
  voxel.map((at, axis) => clamp(at, 0, size[axis] - 1));

// The middle of a voxel on the screen.
/** @returns {{x: number, y: number}} */
export const middleOf = (
  { size }, { left, top, stepX, stepY }, /** @type {number[]} */ [across, up]) =>
  ({ x: left + (across + 0.5) * stepX, y: top + (size[1] - 0.5 - up) * stepY });

export function panned(grid, { scale }, pose, pixels) {
  const extent = extentOf(grid);
  const center = pose.center.map((mm, axis) => clamp(mm - pixels[axis] / scale, 0, extent[axis]));
  return { ...pose, center };
}

// Zoom by a factor; what is at a place of the screen stays there.
export function zoomed(grid, layout, pose, { x, y }, factor) {
  const zoom = clamp(pose.zoom * factor, 1, MAX_ZOOM);
  const share = 1 / layout.scale - pose.zoom / (layout.scale * zoom);
  const byMiddle = [x - layout.width / 2, y - layout.height / 2];
  const center = pose.center.map((mm, axis) => mm + byMiddle[axis] * share);
  return panned(grid, layout, { zoom, center }, [0, 0]);
}
