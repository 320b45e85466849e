// The page: five views of one run, linked by what is selected.
import { render } from "preact";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { data } from "./data";
import { current, saveCsv, savePng, saveSvg } from "./download";
import { Facts } from "./facts";
import { GraphView } from "./graph";
import { MetaView } from "./meta";
import { NodeView } from "./node";
import { Prompts } from "./prompts";
import { hash, read, VIEWS, type Go, type State, type View } from "./state";

const SHOWN: Record<View, (props: { state: State; go: Go }) => preact.JSX.Element> = {
  prompts: Prompts,
  graph: GraphView,
  node: NodeView,
  meta: MetaView,
  facts: Facts,
};
const KEYS = [
  ["1 to 5", "a view"],
  ["/", "search"],
  ["arrows", "along the graph, when it has the focus"],
  ["Enter", "open the node or row"],
  ["p", "pin the node"],
  ["0", "the whole graph"],
  ["Escape", "let go of the selection"],
  ["t", "dark or light"],
  ["?", "this list"],
];

let printing = false; // paper is light

function App() {
  const [state, setState] = useState(read);
  const latest = useRef(state);
  latest.current = state;
  const view = useRef<HTMLElement>(null);
  const help = useRef<HTMLDialogElement>(null);
  const go = useCallback<Go>((change, { replace = false } = {}) => {
    const before = latest.current;
    const leaves = change.view !== undefined && change.view !== before.view;
    // What was searched for and sorted by belongs to the view that is left.
    const next = { ...before, ...(leaves ? { find: "", sort: "", filter: "" } : {}), ...change };
    latest.current = next;
    // A frame made from text, as in a notebook, has another address than its base, to which a bare hash would go.
    history[replace ? "replaceState" : "pushState"](null, "", location.href.split("#")[0] + hash(next));
    setState(next);
    if (leaves) window.scrollTo(0, 0);
  }, []);
  useEffect(() => {
    const back = () => {
      const found = read();
      latest.current = found;
      setState(found);
    };
    addEventListener("popstate", back);
    addEventListener("hashchange", back);
    return () => {
      removeEventListener("popstate", back);
      removeEventListener("hashchange", back);
    };
  }, []);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const turn = () => go({ theme: (state.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark" }, { replace: true });
  const theme = printing ? "light" : state.theme;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName)) return;
      const chosen = VIEWS.find((each) => each.key === event.key);
      if (chosen) go({ view: chosen.id });
      else if (event.key === "t") turn();
      else if (event.key === "?") help.current?.showModal();
      else if (event.key === "/") document.querySelector<HTMLInputElement>("main input[type=search]")?.focus();
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });
  const Shown = SHOWN[state.view];
  const title = VIEWS.find((each) => each.id === state.view)!.title;
  useEffect(() => {
    document.title = `${data.title}: ${title}`;
  }, [title]);
  return (
    <>
      <header class="page">
        <h1>{data.title}</h1>
        <nav aria-label="Views">
          {VIEWS.map((each) => (
            <a href={hash({ ...state, view: each.id, find: "", sort: "", filter: "" })} aria-current={each.id === state.view ? "page" : undefined} title={`Key ${each.key}`} onClick={(event) => { event.preventDefault(); go({ view: each.id }); }}>
              {each.title}
            </a>
          ))}
        </nav>
        <span class="save" role="group" aria-label="Save this view">
          <button type="button" onClick={() => void savePng(view.current!, state.view)}>PNG</button>
          <button type="button" onClick={() => saveSvg(view.current!, state.view)}>SVG</button>
          <button type="button" title="the figures behind this view" onClick={() => { if (current.sheet) saveCsv(); }}>CSV</button>
          <button type="button" onClick={turn} aria-label="Dark or light" title="Dark or light (t)">◐</button>
          <button type="button" onClick={() => help.current?.showModal()} aria-label="Keys and about" title="Keys and about (?)">?</button>
        </span>
      </header>
      <main ref={view} aria-label={title}>
        <Shown state={{ ...state, theme }} go={go} />
      </main>
      <dialog ref={help} aria-label="Keys and about" onClick={(event) => event.target === help.current && help.current?.close()}>
        <h2>Keys</h2>
        <dl class="facts">{KEYS.map(([key, what]) => <div><dt><kbd>{key}</kbd></dt><dd>{what}</dd></div>)}</dl>
        <h2>About</h2>
        <p>A page of latent-mediation {data.run.versions["latent-mediation"]}. It asks nothing of any network; what is selected is in its address. Drawn with Apache ECharts (Apache-2.0) and its ZRender (BSD-3-Clause), Preact (MIT) and tslib (0BSD); their licences are in the package beside this page's script.</p>
        <form method="dialog"><button type="submit">Close</button></form>
      </dialog>
    </>
  );
}

const draw = () => render(<App />, document.getElementById("app")!);
draw();
for (const [event, light] of [["beforeprint", true], ["afterprint", false]] as const) {
  addEventListener(event, () => {
    printing = light;
    draw();
  });
}
