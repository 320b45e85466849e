// Pointing at a node, or reaching it with the keyboard, keeps its edges and neighbours and dims the rest.
const graph = document.getElementById("graph");
const edges = [...graph.querySelectorAll(".edge")];
const nodes = new Map([...graph.querySelectorAll(".node")].map((node) => [node.dataset.n, node]));
function focus(number) {
  graph.classList.add("focus");
  nodes.get(number).classList.add("near");
  for (const edge of edges) {
    const { s, t } = edge.dataset;
    if (s !== number && t !== number) continue;
    edge.classList.add("near");
    nodes.get(s).classList.add("near");
    nodes.get(t).classList.add("near");
  }
}
function blur() {
  graph.classList.remove("focus");
  for (const part of graph.querySelectorAll(".near")) part.classList.remove("near");
}
for (const [number, node] of nodes) {
  for (const name of ["mouseenter", "focus"]) node.addEventListener(name, () => { blur(); focus(number); });
  for (const name of ["mouseleave", "blur"]) node.addEventListener(name, blur);
}
// A wide graph opens at its end, where the behaviour is.
const pane = graph.parentElement;
pane.scrollLeft = pane.scrollWidth;
