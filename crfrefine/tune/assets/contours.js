// The borders of the labels of a plane, as lines along the edges of its voxels. Only numbers.

// Return the lines of each label by its number. A line is a list of corners, [x, y, x, y, …] in
// voxels from the upper left one. `isShown` has a 1 for each label that is not hidden.
export function contoursOf({ rows, columns }, values, isShown) {
  const labelAt = (row, column) => {
    if (row < 0 || column < 0 || row === rows || column === columns) return 0;
    const label = values[row * columns + column];
    return isShown[label] ? label : 0;
  };
  // The label of the edge from each corner to the right, and of the one downwards; 0 means none.
  const corners = columns + 1;
  const right = new Uint16Array((rows + 1) * corners);
  const down = new Uint16Array((rows + 1) * corners);
  for (let row = 0; row <= rows; row += 1) {
    for (let column = 0; column <= columns; column += 1) {
      const here = labelAt(row, column);
      const above = labelAt(row - 1, column);
      const left = labelAt(row, column - 1);
      if (above !== here) right[row * corners + column] = above || here;
      if (left !== here) down[row * corners + column] = left || here;
    }
  }

  // Follow the edges of a label from a corner to their end; each edge is taken once.
  const steps = [
    { edges: right, from: 0, to: 1 }, { edges: down, from: 0, to: corners },
    { edges: right, from: -1, to: -1 }, { edges: down, from: -corners, to: -corners },
  ];
  const follow = (label, start) => {
    const line = [];
    for (let corner = start; ;) {
      line.push(corner % corners, Math.floor(corner / corners));
      const step = steps.find(({ edges, from }) => edges[corner + from] === label);
      if (!step) return line;
      step.edges[corner + step.from] = 0;
      corner += step.to;
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
