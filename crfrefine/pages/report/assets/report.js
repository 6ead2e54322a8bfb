// The page's controls: theme, metric tabs, regions, and the table of cases. Without it, the page shows all charts, one below the other.
(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const UNDEFINED = "–", MOST_ROWS = 50;
  const root = document.documentElement, themeButton = byId("theme"), dark = matchMedia("(prefers-color-scheme: dark)");

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const showTheme = () => { themeButton.textContent = isDark() ? "Light theme" : "Dark theme"; };  // what a click brings
  themeButton.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; showTheme(); });
  dark.addEventListener("change", showTheme);
  showTheme();

  const allRegions = byId("all-regions");
  const showRegions = () => {
    for (const table of document.querySelectorAll("table.summary")) table.classList.toggle("leads-only", !allRegions.checked);
  };
  allRegions.addEventListener("input", showRegions);
  showRegions();

  const tabs = [...document.querySelectorAll('[role="tab"]')], sets = [...document.querySelectorAll(".chart-set")];
  const region = byId("region"), tableMetric = byId("table-metric"), tableRegion = byId("table-region");

  function fillRegions(select, metric) {
    const wanted = select.value;
    const isDrawn = (name) => sets.some((set) => set.dataset.metric === metric && set.dataset.region === name);
    const choices = (data.choices[metric] ?? []).filter(([name]) => select !== region || isDrawn(name));
    select.replaceChildren(...choices.map(([name, title]) => new Option(title, name)));
    if (choices.some(([name]) => name === wanted)) select.value = wanted;
  }
  function showCharts() {
    const metric = tabs.find((tab) => tab.ariaSelected === "true")?.dataset.metric;
    for (const set of sets) set.hidden = set.dataset.metric !== metric || set.dataset.region !== region.value;
  }
  function choose(tab, focus) {
    for (const other of tabs) { other.ariaSelected = String(other === tab); other.tabIndex = other === tab ? 0 : -1; }
    if (focus) tab.focus();
    fillRegions(region, tab.dataset.metric);
    showCharts();
    tableMetric.value = tab.dataset.metric;
    fillRegions(tableRegion, tab.dataset.metric);
    tableRegion.value = region.value;
    fillTable();
  }
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => choose(tab, false));
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const next = { ArrowRight: index === last ? 0 : index + 1, ArrowLeft: index === 0 ? last : index - 1, Home: 0, End: last }[event.key];
      if (next !== undefined) { event.preventDefault(); choose(tabs[next], true); }
    });
  });
  region.addEventListener("input", () => { showCharts(); tableRegion.value = region.value; fillTable(); });

  // ---- the table of cases ----
  const table = byId("case-table"), filter = byId("filter"), kind = byId("kind"), more = byId("more"), status = byId("table-status");
  const head = table.tHead.rows[0], body = table.tBodies[0];
  const MARKS = { better: "▲ better", worse: "▼ worse", equal: "● equal", undefined: UNDEFINED };
  const names = new Intl.Collator(undefined, { numeric: true });
  let sorting = { key: data.compared ? "difference" : "value-0", down: false }, showAll = false;

  const number = (value, shown, signed) => {
    if (value === null) return UNDEFINED;
    const text = (value * shown.factor).toFixed(shown.digits), zero = Number(text) === 0;
    const sign = zero ? "" : value < 0 ? "\u2212" : signed ? "+" : "";
    return sign + text.replace("-", "");
  };

  function columns() {
    const values = data.methods.map((method, index) => ({ key: `value-${index}`, title: method, isNumber: true }));
    if (!data.compared) return [{ key: "case", title: "Case" }, ...values];
    const added = [{ key: "difference", title: "Difference", isNumber: true }, { key: "kind", title: "Result" }];
    return [{ key: "case", title: "Case" }, ...values.slice(0, 2), ...added, ...values.slice(2)];
  }

  function rowsOf(metricName, regionName) {
    const metric = data.metrics[metricName], values = data.values[metricName][regionName];
    const largest = Math.max(1e-300, ...values.slice(0, 2).flat().map((value) => Math.abs(value ?? 0)));
    return data.cases.map((name, index) => {
      const row = { case: name };
      values.forEach((list, method) => { row[`value-${method}`] = list[index]; });
      if (data.compared) {
        const [before, after] = [row["value-0"], row["value-1"]];
        row.difference = before === null || after === null ? null : Math.abs(after - before) <= 1e-7 * largest ? 0 : after - before;
        const gain = (metric.better === "higher" ? 1 : -1) * row.difference;
        row.kind = row.difference === null || metric.better === null ? "undefined" : gain > 0 ? "better" : gain < 0 ? "worse" : "equal";
      }
      return row;
    });
  }

  // Undefined values come last in both directions; equal ones are sorted by name.
  function compare(one, other) {
    const [a, b] = [one[sorting.key], other[sorting.key]], sign = sorting.down ? -1 : 1;
    const missing = (value) => value === null || value === undefined || (sorting.key === "kind" && value === "undefined");
    if (missing(a) || missing(b)) return missing(a) - missing(b) || names.compare(one.case, other.case);
    return sign * (typeof a === "number" ? a - b : names.compare(a, b)) || names.compare(one.case, other.case);
  }

  function fillTable() {
    const metricName = tableMetric.value, regionName = tableRegion.value;
    if (!metricName || !regionName) return;
    const metric = data.metrics[metricName];
    const shownAs = (column) => (column.key === "difference" ? metric.differences : metric.values);
    const unitOf = (column) => (column.isNumber && shownAs(column).unit ? ` (${shownAs(column).unit})` : "");
    head.replaceChildren(...columns().map((column) => {
      const cell = document.createElement("th"), button = document.createElement("button");
      cell.scope = "col";
      cell.className = column.isNumber ? "number" : "";
      cell.setAttribute("aria-sort", sorting.key === column.key ? (sorting.down ? "descending" : "ascending") : "none");
      button.type = "button";
      button.dataset.key = column.key;
      button.textContent = column.title + unitOf(column);
      cell.append(button);
      return cell;
    }));
    const wanted = filter.value.trim().toLocaleLowerCase();
    const all = rowsOf(metricName, regionName);
    const isWanted = (row) => row.case.toLocaleLowerCase().includes(wanted) && (!kind?.value || row.kind === kind.value);
    const rows = all.filter(isWanted).sort(compare);
    const shown = showAll ? rows : rows.slice(0, MOST_ROWS);
    body.replaceChildren(...shown.map((row) => {
      const line = document.createElement("tr");
      for (const column of columns()) {
        const cell = document.createElement(column.key === "case" ? "th" : "td");
        if (column.key === "case") {
          cell.scope = "row";
          const view = data.views[row.case];
          if (view) {
            const link = document.createElement("a");
            link.href = `#${view}`;
            link.textContent = row.case;
            cell.append(link);
          } else cell.textContent = row.case;
        } else if (column.key === "kind") {
          cell.className = `result ${row.kind}`;
          cell.textContent = MARKS[row.kind];
        } else {
          cell.className = "number";
          cell.textContent = number(row[column.key], shownAs(column), column.key === "difference");
        }
        line.append(cell);
      }
      return line;
    }));
    more.hidden = shown.length === rows.length;
    more.textContent = `Show all ${rows.length} rows`;
    status.textContent = `${rows.length} of ${all.length} cases` + (shown.length < rows.length ? `, the first ${shown.length} shown` : "");
  }

  head.addEventListener("click", (event) => {
    const key = event.target.closest("button")?.dataset.key;
    if (!key) return;
    sorting = { key, down: sorting.key === key && !sorting.down };
    fillTable();
    head.querySelector(`button[data-key="${key}"]`).focus();
  });
  tableMetric.addEventListener("input", () => { fillRegions(tableRegion, tableMetric.value); fillTable(); });
  for (const control of [tableRegion, filter, kind]) control?.addEventListener("input", fillTable);
  more.addEventListener("click", () => { showAll = true; fillTable(); });
  // ---- tables wider than the screen ----
  const tables = [...document.querySelectorAll(".scroll")].map((box) => {
    const hint = document.createElement("p");
    hint.className = "more-columns";
    hint.textContent = "Scroll sideways for more columns →";
    box.before(hint);
    return { box, hint };
  });
  const showHints = () => { for (const { box, hint } of tables) hint.hidden = box.scrollWidth <= box.clientWidth + 1; };
  const watcher = new ResizeObserver(showHints);
  for (const { box } of tables) { watcher.observe(box); watcher.observe(box.firstElementChild); }

  if (tabs.length) choose(tabs[0], false);
  else if (tableMetric.value) { fillRegions(tableRegion, tableMetric.value); fillTable(); }
})();
