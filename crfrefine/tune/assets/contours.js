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
  // The box of the labels that are shown: most planes have none in most places.
  let [top, bottom, start, stop] = [rows, 0, columns, 0];
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      if (!isShown[values[row * columns + column]]) continue;
      if (row < top) top = row;
      if (row >= bottom) bottom = row + 1;
      if (column < start) start = column;
      if (column >= stop) stop = column + 1;
    }
  }
  const lines = new Map();
  if (top === rows) return lines;
  const labelAt = (row, column) => {
    if (row < top || column < start || row === bottom || column === stop) return 0;
    const label = values[row * columns + column];
    return isShown[label] ? label : 0;
  };
  // The label of the edge from each corner of the box in each direction; 0 means none.
  const corners = stop - start + 1;
  const edges = STEPS.map(() => new Uint16Array((bottom - top + 1) * corners));
  let corner = 0;
  for (let row = top; row <= bottom; row += 1) {
    for (let column = start; column <= stop; column += 1) {
      const here = labelAt(row, column);
      const above = labelAt(row - 1, column);
      const left = labelAt(row, column - 1);
      if (above !== here) {
        edges[0][corner] = here;
        edges[2][corner + 1] = above;
      }
      if (left !== here) {
        edges[1][corner] = left;
        edges[3][corner + corners] = here;
      }
      corner += 1;
    }
  }

  // Follow the edges of a label from a corner on, back to it; each edge is taken once.
  const follow = (label, first, firstWay) => {
    const line = [];
    let [at, way] = [first, firstWay];
    for (;;) {
      edges[way][at] = 0;
      const [right, down] = STEPS[way];
      at += right + down * corners;
      let next = -1;
      for (const turn of TURNS) {
        const one = (way + turn) % 4;
        if (next < 0 && edges[one][at] === label) next = one;
      }
      const following = next < 0 ? firstWay : next;
      if (following !== way) {
        line.push(start + (at % corners), top + Math.floor(at / corners),
          INWARDS[way][0] + INWARDS[following][0], INWARDS[way][1] + INWARDS[following][1]);
      }
      if (next < 0) return line;
      way = next;
    }
  };
  for (corner = 0; corner < edges[0].length; corner += 1) {
    for (let way = 0; way < 4; way += 1) {
      const label = edges[way][corner];
      if (!label) continue;
      if (!lines.has(label)) lines.set(label, []);
      lines.get(label).push(follow(label, corner, way));
    }
  }
  return lines;
}
