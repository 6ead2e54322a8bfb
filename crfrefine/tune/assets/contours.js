// The borders of the labels of a plane, as closed lines along the edges of its voxels. Each label
// has lines of its own, at its side of a border. Only numbers.

// Right, down, left and up; a label lies at the right hand of its lines. Towards it, so are these.
const STEPS = [[1, 0], [0, 1], [-1, 0], [0, -1]];
const INWARDS = [[0, 1], [-1, 0], [0, -1], [1, 0]];
const TURNS = [1, 0, 3]; // to the right, none, to the left: voxels that meet at a corner are apart

// Return the lines of each label by its number. A line is a list of its corners, in voxels from the
// upper left one, each with the direction towards the label: [x, y, inX, inY, x, y, …]. `isShown`
// has a 1 for each label that is not hidden.
export function contoursOf({ rows, columns }, values, isShown) {
  const labelAt = (row, column) => {
    if (row < 0 || column < 0 || row === rows || column === columns) return 0;
    const label = values[row * columns + column];
    return isShown[label] ? label : 0;
  };
  // The label of the edge from each corner in each direction; 0 means none.
  const corners = columns + 1;
  const edges = STEPS.map(() => new Uint16Array((rows + 1) * corners));
  for (let row = 0; row <= rows; row += 1) {
    for (let column = 0; column <= columns; column += 1) {
      const here = labelAt(row, column);
      const above = labelAt(row - 1, column);
      const left = labelAt(row, column - 1);
      const corner = row * corners + column;
      if (above !== here) {
        edges[0][corner] = here;
        edges[2][corner + 1] = above;
      }
      if (left !== here) {
        edges[1][corner] = left;
        edges[3][corner + corners] = here;
      }
    }
  }

  // Follow the edges of a label from a corner on, back to it; each edge is taken once.
  const follow = (label, start, first) => {
    const line = [];
    let corner = start;
    for (let way = first; ;) {
      edges[way][corner] = 0;
      const [right, down] = STEPS[way];
      corner += right + down * corners;
      const ways = TURNS.map((turn) => (way + turn) % 4);
      const next = ways.find((one) => edges[one][corner] === label);
      const following = next ?? first;
      if (following !== way) {
        const [inX, inY] = INWARDS[way].map((by, axis) => by + INWARDS[following][axis]);
        line.push(corner % corners, Math.floor(corner / corners), inX, inY);
      }
      if (next === undefined) return line;
      way = next;
    }
  };
  const lines = new Map();
  for (let corner = 0; corner < edges[0].length; corner += 1) {
    for (let way = 0; way < 4; way += 1) {
      const label = edges[way][corner];
      if (!label) continue;
      if (!lines.has(label)) lines.set(label, []);
      lines.get(label).push(follow(label, corner, way));
    }
  }
  return lines;
}
