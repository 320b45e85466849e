// The drawing of a graph: two ECharts on top of each other, so that pointing at a node draws its own edges anew and
// never the other twenty thousand.
import type { CustomSeriesRenderItemAPI, CustomSeriesRenderItemReturn } from "echarts/types/dist/shared";
import { colours, FONT, graphic, init, sign, type Colours, type EChartsType, type Option } from "./charts";
import type { Layout } from "./layout";
import type { Graph } from "./model";
import type { Kept } from "./prune";
import { signed } from "./text";

export const GRID = { left: 134, right: 22, top: 16, bottom: 46 };
const WIDTHS = [0.5, 0.9, 1.5, 2.6, 4.4]; // of an edge, by size
const LABELS = { roomy: 140, close: 40 }; // names drawn at once; zooming in shows those of what is left in view
const DIM = "0.28"; // of all else while a node is pointed at

export interface Scene {
  graph: Graph;
  kept: Kept;
  layout: Layout;
  rowNotes: string[]; // a second line under each row's title
  pinned: Set<number>;
}

interface Ends {
  segments: Float64Array; // x0, y0, x1, y1 of each edge, in the layout's units
}

/** Edges as curves that leave upwards and arrive from below. */
const Links = graphic.extendShape({
  shape: { segments: new Float64Array(0), a: 1, b: 0, c: 1, d: 0 } as Ends & Record<"a" | "b" | "c" | "d", number>,
  buildPath(path: CanvasRenderingContext2D, shape: Ends & Record<"a" | "b" | "c" | "d", number>) {
    const { segments, a, b, c, d } = shape;
    for (let k = 0; k < segments.length; k += 4) {
      const [x0, y0, x1, y1] = [a * segments[k] + b, c * segments[k + 1] + d, a * segments[k + 2] + b, c * segments[k + 3] + d];
      const bend = (y0 - y1) * 0.45;
      path.moveTo(x0, y0);
      path.bezierCurveTo(x0, y0 - bend, x1, y1 + bend, x1, y1);
    }
  },
  getBoundingRect: () => new graphic.BoundingRect(-1e5, -1e5, 2e5, 2e5), // thousands of curves have theirs measured else
  contain: () => false,
} as never);
graphic.registerShape("links", Links);

export function strength(graph: Graph): Float64Array<ArrayBuffer> {
  const found = Float64Array.from(graph.nodes.attribution, (value) => Math.abs(value ?? NaN));
  const flow = new Float64Array(found.length);
  graph.edges.source.forEach((source, k) => (flow[source] += graph.edges.contribution[k]));
  return found.map((value, k) => (Number.isNaN(value) ? Math.abs(flow[k]) : value));
}

export class Canvas {
  private readonly base: EChartsType;
  private readonly lens: EChartsType;
  private scene: Scene | null = null;
  private size = new Float64Array(0);
  private largest = 1;
  private focused: number | null = null;
  private timer = 0;
  private view: [number, number, number, number] = [0, 1, 0, 1]; // left, right, bottom, top, as parts of the whole

  constructor(
    private readonly under: HTMLElement,
    over: HTMLElement,
    events: { point: (node: number | null) => void; pick: (node: number | null, shift: boolean) => void; open: (node: number) => void },
  ) {
    this.base = init(under, null, { renderer: "canvas" });
    this.lens = init(over, null, { renderer: "canvas" });
    const node = (event: { seriesId?: string; dataIndex: number }) =>
      event.seriesId === "nodes" && this.scene ? this.scene.kept.nodes[event.dataIndex] : null;
    this.base.on("mouseover", (event) => events.point(node(event)));
    this.base.on("mouseout", () => events.point(null));
    this.base.on("click", (event) => events.pick(node(event), !!(event.event?.event as MouseEvent | undefined)?.shiftKey));
    this.base.on("dblclick", (event) => {
      const at = node(event);
      if (at !== null) events.open(at);
    });
    this.base.getZr().on("click", (event) => {
      if (!event.target) events.pick(null, false);
    });
    this.base.on("datazoom", () => {
      this.view = this.zoomed();
      this.focus(this.focused);
      clearTimeout(this.timer);
      this.timer = window.setTimeout(() => this.base.setOption({ series: [{ id: "nodes", data: this.dots(colours()) }] }), 90);
    });
  }

  draw(scene: Scene) {
    if (this.scene?.graph !== scene.graph) this.view = [0, 1, 0, 1]; // another graph is shown whole
    this.scene = scene;
    const { graph, kept } = scene;
    this.size = strength(graph);
    this.largest = Math.max(...Array.from(kept.nodes, (node) => (graph.nodes.kind[node] === "target" ? 0 : this.size[node])), 1e-12);
    this.base.setOption(this.option(colours()), true);
    this.focus(this.focused !== null && kept.nodes.includes(this.focused) ? this.focused : null);
  }

  /** Keeps a node, its edges and its neighbours bright; null: everything again. */
  focus(node: number | null) {
    this.focused = node;
    this.under.style.opacity = node === null ? "1" : DIM;
    if (!this.scene || node === null) {
      this.lens.clear();
      return;
    }
    const c = colours();
    const { graph, kept } = this.scene;
    const edges = kept.edges.filter((edge) => graph.edges.source[edge] === node || graph.edges.target[edge] === node);
    const near = new Set<number>([node]);
    for (const edge of edges) near.add(graph.edges.source[edge]).add(graph.edges.target[edge]);
    const nodes = [...near].sort((a, b) => this.size[b] - this.size[a]);
    const unit = this.unit();
    this.lens.setOption(
      {
        ...this.frame(c),
        series: [this.links(edges, c, 0.95), this.series(nodes.map((each, k) => this.dot(each, c, unit, k < 40 || each === node)), c)],
      },
      true,
    );
  }

  fit() {
    this.base.dispatchAction({ type: "dataZoom", batch: [{ dataZoomIndex: 0, start: 0, end: 100 }, { dataZoomIndex: 1, start: 0, end: 100 }] });
  }

  resize() {
    this.base.resize();
    this.lens.resize();
    if (this.scene) this.draw(this.scene);
  }

  /** The drawing as SVG text, with nothing dimmed. */
  svg(): string {
    const chart = init(null, null, { renderer: "svg", ssr: true, width: this.under.clientWidth, height: this.under.clientHeight });
    chart.setOption({ ...this.option(colours()), dataZoom: [] });
    const text = chart.renderToSVGString();
    chart.dispose();
    return text;
  }

  dispose() {
    clearTimeout(this.timer);
    this.base.dispose();
    this.lens.dispose();
  }

  /** Where a node stands on the screen, relative to the drawing. */
  where(node: number): [number, number] | null {
    if (!this.scene?.kept.nodes.includes(node)) return null;
    const { x, y } = this.scene.layout;
    const at = this.base.convertToPixel({ gridIndex: 0 }, [x[node], y[node]]);
    return [at[0], at[1]];
  }

  private window(): [[number, number], [number, number]] {
    const { width, height } = this.scene!.layout;
    const [left, right, bottom, top] = this.view;
    return [[left * width, right * width], [bottom * height, top * height]];
  }

  /** What is in view after a zoom. Asked once: ECharts answers with a copy of everything. */
  private zoomed(): [number, number, number, number] {
    const { dataZoom } = this.base.getOption() as { dataZoom: { start: number; end: number }[] };
    const [x, y] = dataZoom;
    return [x.start / 100, x.end / 100, y.start / 100, y.end / 100];
  }

  /** What both drawings share: the part of the plane that is in view, and the names of its columns and rows. */
  private frame(c: Colours): Option {
    const { layout, rowNotes } = this.scene!;
    const [x, y] = this.window();
    const named = (bands: Layout["rows"], text: (k: number) => string) => {
      const shown = bands.map((band, k) => ({ band, k })).filter(({ band }) => band.size > 0);
      const values = shown.map(({ band }) => band.start + band.size / 2);
      return {
        customValues: values,
        formatter: (value: number) => {
          const k = values.findIndex((each) => Math.abs(each - value) < 1e-6);
          return k < 0 ? "" : text(shown[k].k);
        },
      };
    };
    const axis = { type: "value", axisLine: { show: false }, axisTick: { show: false }, splitLine: { show: false } };
    const text = { color: c.soft, fontFamily: FONT, fontSize: 11.5 };
    const narrow = ((this.under.clientWidth - GRID.left - GRID.right) / layout.width) * Math.min(...layout.columns.map((band) => band.size));
    return {
      animation: false,
      backgroundColor: "transparent",
      grid: GRID,
      xAxis: {
        ...axis,
        min: x[0],
        max: x[1],
        axisLabel: {
          ...text, ...named(layout.columns, (k) => layout.columns[k].title), hideOverlap: true, fontWeight: 600,
          ...(narrow < 34 ? { rotate: 38 } : { width: Math.max(narrow, 60), overflow: "truncate" }),
        },
      },
      yAxis: {
        ...axis,
        min: y[0],
        max: y[1],
        axisLabel: {
          ...text, ...named(layout.rows, (k) => (rowNotes[k] ? `{a|${layout.rows[k].title}}\n{b|${rowNotes[k]}}` : `{a|${layout.rows[k].title}}`)),
          rich: { a: { ...text, color: c.ink, fontWeight: 600, lineHeight: 15 }, b: { ...text, fontSize: 10.5, lineHeight: 14 } },
        },
      },
    };
  }

  private option(c: Colours): Option {
    const frame = this.frame(c) as { xAxis: Option; yAxis: Option };
    const [left, right, bottom, top] = this.view;
    const { layout, kept } = this.scene!;
    return {
      ...frame,
      xAxis: { ...frame.xAxis, min: 0, max: layout.width },
      yAxis: { ...frame.yAxis, min: 0, max: layout.height },
      dataZoom: [
        { type: "inside", xAxisIndex: 0, filterMode: "none", minSpan: 4, start: 100 * left, end: 100 * right },
        { type: "inside", yAxisIndex: 0, filterMode: "none", minSpan: 4, start: 100 * bottom, end: 100 * top },
      ],
      series: [this.bands(c), this.links(kept.edges, c, 1), this.series(this.dots(c), c)],
    };
  }

  private series(dots: Option[], c: Colours): Option {
    return {
      id: "nodes",
      type: "scatter",
      data: dots,
      z: 3,
      itemStyle: { opacity: 1 },
      cursor: "pointer",
      emphasis: { disabled: true },
      label: {
        position: "right", distance: 4, color: c.ink, fontSize: 11, fontFamily: FONT, formatter: "{b}", textBorderColor: c.band,
        textBorderWidth: 2.5,
      },
      labelLayout: { hideOverlap: true },
    };
  }

  private dots(c: Colours): Option[] {
    const { graph, kept, layout } = this.scene!;
    const [[left, right], [bottom, top]] = this.window();
    const inside = (node: number) =>
      layout.x[node] >= left && layout.x[node] <= right && layout.y[node] >= bottom && layout.y[node] <= top;
    // Columns are named after tokens, and the shape says what an error is.
    const seen = Array.from(kept.nodes).filter((node) => inside(node) && !["error", "embedding"].includes(graph.nodes.kind[node]));
    const named = new Set(seen.sort((a, b) => this.size[b] - this.size[a]).slice(0, layout.labelled ? LABELS.roomy : LABELS.close));
    for (const node of this.scene!.pinned) named.add(node);
    const unit = this.unit();
    return Array.from(kept.nodes, (node) => this.dot(node, c, unit, named.has(node)));
  }

  /** Pixels of one unit of the layout across, as it is zoomed. */
  private unit(): number {
    const [[left, right]] = this.window();
    return (this.under.clientWidth - GRID.left - GRID.right) / Math.max(right - left, 1e-9);
  }

  private dot(node: number, c: Colours, unit: number, named: boolean): Option {
    const { graph, layout, pinned, kept } = this.scene!;
    const { nodes } = graph;
    const kind = nodes.kind[node];
    const fill = kind === "target" ? c.ink : kind === "embedding" ? c.none : sign(nodes.attribution[node], c);
    const [least, most] = layout.labelled ? [7, 26] : kept.nodes.length > 600 ? [3, 13] : [4, 18];
    const diameter = kind === "target" ? most : least + (most - least) * Math.sqrt(Math.min(1, this.size[node] / this.largest));
    const value = nodes.attribution[node];
    const last = kind === "target";
    return {
      name: last ? `${graph.label[node]} ${signed(value)}` : graph.label[node],
      value: [layout.x[node], layout.y[node]],
      symbol: kind === "error" ? "diamond" : kind === "embedding" ? "rect" : kind === "target" ? "roundRect" : "circle",
      symbolSize: diameter,
      itemStyle: {
        color: kind === "error" ? c.card : fill,
        borderColor: pinned.has(node) ? c.ink : kind === "error" ? fill : kind === "supernode" ? c.ink : c.card,
        borderWidth: pinned.has(node) ? 2.5 : kind === "error" ? 2 : kind === "supernode" ? 1.8 : 0.8,
      },
      label: {
        show: named,
        ...(last ? { position: "left", fontWeight: 700 } : {}),
        ...(layout.labelled && !last ? { width: Math.max(0.84 * unit - diameter / 2 - 6, 24), overflow: "truncate" } : {}),
      },
    };
  }

  private links(edges: Int32Array, c: Colours, opacity: number): Option {
    const { graph, layout } = this.scene!;
    const { source, target, contribution } = graph.edges;
    let largest = 1e-12;
    for (const edge of this.scene!.kept.edges) largest = Math.max(largest, Math.abs(contribution[edge]));
    const buckets: number[][] = Array.from({ length: 2 * WIDTHS.length }, () => []);
    for (const edge of edges) {
      const size = Math.sqrt(Math.abs(contribution[edge]) / largest);
      const bucket = Math.min(WIDTHS.length - 1, Math.floor(size * WIDTHS.length));
      buckets[2 * bucket + (contribution[edge] > 0 ? 0 : 1)].push(edge);
    }
    const segments = buckets.map((bucket) => {
      const found = new Float64Array(4 * bucket.length);
      bucket.forEach((edge, k) => found.set([layout.x[source[edge]], layout.y[source[edge]], layout.x[target[edge]], layout.y[target[edge]]], 4 * k));
      return found;
    });
    const thin = edges.length > 4000 ? 0.45 : edges.length > 800 ? 0.75 : 1;
    return {
      id: "links",
      type: "custom",
      coordinateSystem: "cartesian2d",
      clip: true,
      silent: true,
      z: 2,
      data: buckets.map((_, k) => [k, k]),
      renderItem: (_: unknown, api: CustomSeriesRenderItemAPI): CustomSeriesRenderItemReturn => {
        const k = Number(api.value(0));
        const level = k >> 1;
        const [origin, unit] = [api.coord([0, 0]), api.coord([1, 1])];
        return {
          type: "links",
          shape: { segments: segments[k], a: unit[0] - origin[0], b: origin[0], c: unit[1] - origin[1], d: origin[1] },
          style: {
            fill: "none", stroke: k % 2 ? c.down : c.up, lineWidth: WIDTHS[level] * (level < 2 ? thin : 1),
            opacity: opacity * Math.min(1, (0.22 + 0.17 * level) * (level < 2 ? thin : 1) + (opacity < 1 ? 0.25 : 0)),
          },
        } as unknown as CustomSeriesRenderItemReturn;
      },
    };
  }

  private bands(c: Colours): Option {
    const { layout } = this.scene!;
    return {
      id: "bands",
      type: "custom",
      coordinateSystem: "cartesian2d",
      clip: true,
      silent: true,
      z: 1,
      data: [[0, 0]],
      renderItem: (_: unknown, api: CustomSeriesRenderItemAPI): CustomSeriesRenderItemReturn => {
        const rect = (x0: number, y0: number, x1: number, y1: number, r: number) => {
          const [a, b] = [api.coord([x0, y0]), api.coord([x1, y1])];
          return { type: "rect" as const, shape: { x: a[0], y: b[1], width: b[0] - a[0], height: a[1] - b[1], r }, style: { fill: c.band } };
        };
        const rows = layout.rows.filter((band) => band.size > 0);
        const gap = layout.labelled ? 0.3 : 0.6;
        return { type: "group", children: rows.map((band) => rect(0, band.start - gap, layout.width, band.start + band.size + gap, 6)) };
      },
    };
  }
}
