// ECharts, cut to what the page draws; charts are SVG, the graph canvas. Nothing that comes from data is ever markup:
// ECharts' own tooltips, which are, stay off.
import { BarChart, CustomChart, SankeyChart, ScatterChart, LineChart } from "echarts/charts";
import { AriaComponent, DataZoomInsideComponent, GridComponent, MarkLineComponent } from "echarts/components";
import { graphic, init, use, type EChartsType } from "echarts/core";
import { LabelLayout } from "echarts/features";
import { CanvasRenderer, SVGRenderer } from "echarts/renderers";
import { useLayoutEffect, useRef } from "preact/hooks";

use([
  BarChart, CustomChart, SankeyChart, ScatterChart, LineChart, AriaComponent, DataZoomInsideComponent, GridComponent,
  MarkLineComponent, LabelLayout, CanvasRenderer, SVGRenderer,
]);

export { graphic, init, type EChartsType };
export type Option = Record<string, unknown>;

export interface Colours {
  ink: string;
  soft: string;
  line: string;
  card: string;
  band: string;
  up: string;
  down: string;
  none: string;
  mark: string;
}

/** The page's colours as the style sheet has them now. */
export function colours(): Colours {
  const style = getComputedStyle(document.documentElement);
  const named = ["ink", "soft", "line", "card", "band", "up", "down", "none", "mark"] as const;
  return Object.fromEntries(named.map((name) => [name, style.getPropertyValue(`--${name}`).trim()])) as unknown as Colours;
}

export const sign = (value: number | null | undefined, c: Colours): string => (!value ? c.none : value > 0 ? c.up : c.down);

export const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"; // stands in attributes

interface Props {
  option: (c: Colours, width: number) => Option;
  height: number;
  label: string; // what the chart says, for screen readers
  theme: string;
  onClick?: (index: number, kind: string) => void;
}

export function Chart({ option, height, label, theme, onClick }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const chart = useRef<EChartsType | null>(null);
  const latest = useRef({ option, onClick });
  latest.current = { option, onClick };
  const draw = () => {
    const width = box.current?.clientWidth ?? 0;
    if (!width) return;
    const base = { animation: false, textStyle: { fontFamily: FONT }, aria: { enabled: false } };
    chart.current?.setOption({ ...base, ...latest.current.option(colours(), width) }, true);
  };
  useLayoutEffect(() => {
    const made = (chart.current = init(box.current!, null, { renderer: "svg" }));
    made.on("click", (event) => latest.current.onClick?.(event.dataIndex, String(event.dataType ?? "")));
    const watch = new ResizeObserver(() => {
      made.resize();
      draw();
    });
    watch.observe(box.current!);
    return () => {
      watch.disconnect();
      made.dispose();
    };
  }, []);
  useLayoutEffect(draw);
  return <div class="chart" ref={box} role="img" aria-label={label} style={{ height: `${height}px` }} data-theme={theme} />;
}
