// Justified rows: pictures of any shape in rows that fill the width, with their own proportions.

const FLATTEST = 84;   // pixels: a panorama is cut rather than shown lower
const LOWEST = 0.8, HIGHEST = 1.6;   // heights of a row that are avoided, as pictures become narrow or few
const LAST = 1.15;   // the last row need not fill the width, and is at most this much higher than the others

// Returns [{left, top, width, height, row}] for ratios (width / height), and the height of all of them. Heights are of
// the whole card: `about` pixels of it are below the picture. Pictures that would be too flat, or narrower than about
// `narrowest` pixels, are cut.
export function justify(ratios, width, { row, gap, about, narrowest }) {
  const shape = ratio => Math.min(Math.max(ratio, narrowest / row), Math.max(1, width / FLATTEST));
  const boxes = [];
  let top = 0, first = 0, sum = 0, number = 0;

  function place(end, height) {
    let left = 0;
    for (let at = first; at < end; at++) {
      const wide = Math.min(shape(ratios[at]) * height, width);
      boxes.push({ left, top, width: wide, height: height + about, row: number });
      left += wide + gap;
    }
    top += height + about + gap;
    first = end;
    number++;
  }

  const fill = (total, count) => (width - gap * (count - 1)) / total;
  for (let at = 0; at < ratios.length; at++) {
    const ratio = shape(ratios[at]), count = at - first;
    if (count && fill(sum + ratio, count + 1) < row) {
      const without = fill(sum, count), together = fill(sum + ratio, count + 1);
      const nearer = together / row >= row / without;   // to the height that a row should have
      if (nearer && (together > LOWEST * row || without > HIGHEST * row)) {
        place(at + 1, together);
        sum = 0;
        continue;
      }
      place(at, without);
      sum = 0;
    }
    sum += ratio;
  }
  if (first < ratios.length) place(ratios.length, Math.min(fill(sum, ratios.length - first), row * LAST));
  return { boxes, height: Math.max(0, top - gap) };
}

// Returns the range [from, to) of the boxes that lie between two heights. Boxes are ordered by their top.
export function between(boxes, above, below) {
  const search = past => {
    let low = 0, high = boxes.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (past(boxes[middle])) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  return [search(box => box.top + box.height >= above), search(box => box.top > below)];
}
