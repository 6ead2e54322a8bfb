// The borders of the labels of a plane, as lines along the edges of its voxels. Only numbers.

// Return the lines of each label by its number. A line is a list of corners, [x, y, x, y, …] in
// voxels from the upper left one. `isShown` has a 1 for each label that is not hidden.
export function contoursOf({ rows, columns }, values, isShown) {
  const wide = columns + 2; // of the plane with a margin, in which hidden labels are 0
  const cells = new Uint16Array((rows + 2) * wide);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const value = values[row * columns + column];
      if (isShown[value]) cells[(row + 1) * wide + column + 1] = value;
    }
  }
  // The label of the edge from each corner to the right, and of the one downwards; 0 means none.
  const corners = columns + 1;
  const right = new Uint16Array((rows + 1) * corners);
  const down = new Uint16Array((rows + 1) * corners);
  for (let row = 0; row <= rows; row += 1) {
    for (let column = 0; column <= columns; column += 1) {
      const above = cells[row * wide + column + 1];
      const left = cells[(row + 1) * wide + column];
      const here = cells[(row + 1) * wide + column + 1];
      const corner = row * corners + column;
      if (column < columns && above !== here) right[corner] = above || here;
      if (row < rows && left !== here) down[corner] = left || here;
    }
  }

  // Follow the edges of a label from a corner to their end; each edge is taken once.
  const follow = (label, start) => {
    const line = [];
    for (let corner = start; ;) {
      line.push(corner % corners, Math.floor(corner / corners));
      if (right[corner] === label) {
        right[corner] = 0;
        corner += 1;
      } else if (down[corner] === label) {
        down[corner] = 0;
        corner += corners;
      } else if (right[corner - 1] === label) {
        right[corner - 1] = 0;
        corner -= 1;
      } else if (down[corner - corners] === label) {
        down[corner - corners] = 0;
        corner -= corners;
      } else {
        return line;
      }
    }
  };
  const lines = new Map();
  for (let corner = 0; corner < right.length; corner += 1) {
    for (const edges of [right, down]) {
      const label = edges[corner];
      if (!label) continue;
      if (!lines.has(label)) lines.set(label, []);
      lines.get(label).push(follow(label, corner));
    }
  }
  return lines;
}
