// A view as a file: its figures as CSV, the view itself as PNG or SVG.
import { data } from "./data";

export type Cell = string | number | boolean | null | undefined;
export interface Sheet {
  name: string;
  columns: string[];
  rows: Cell[][];
}

/** What the view that is shown would give; each view sets it when it draws. */
export const current: { sheet: (() => Sheet) | null; svg: (() => string) | null } = { sheet: null, svg: null };

export function csv(sheet: Sheet): string {
  const quoted = (cell: Cell) => {
    if (cell == null) return "";
    let text = String(cell);
    if (typeof cell === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // a spreadsheet would run it
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [sheet.columns, ...sheet.rows].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

export function save(name: string, content: Blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = `${data.title}-${name}`.replaceAll(/[^\w.-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export function saveCsv() {
  const sheet = current.sheet?.();
  if (sheet) save(`${sheet.name}.csv`, new Blob([csv(sheet)], { type: "text/csv" }));
}

export function saveSvg(view: HTMLElement, name: string) {
  save(`${name}.svg`, new Blob([current.svg?.() ?? picture(view)], { type: "image/svg+xml" }));
}

export async function savePng(view: HTMLElement, name: string) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(picture(view))}`;
  await image.decode();
  const scale = Math.min(2, LONGEST / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width * scale, image.height * scale];
  const context = canvas.getContext("2d")!;
  context.scale(scale, scale);
  context.drawImage(image, 0, 0);
  const blob = await new Promise<Blob | null>((done) => canvas.toBlob(done, "image/png"));
  if (blob) save(`${name}.png`, blob);
}

const LONGEST = 16_000; // pixels of a side that every browser can draw
const FORBIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g; // in XML

/** The view as an SVG that holds the page's own markup and style, canvases as pictures. */
function picture(view: HTMLElement): string {
  const { width, height } = view.getBoundingClientRect();
  const copy = view.cloneNode(true) as HTMLElement;
  const canvases = view.querySelectorAll("canvas");
  copy.querySelectorAll("canvas").forEach((canvas, k) => {
    const image = document.createElement("img");
    image.src = canvases[k].toDataURL();
    image.style.cssText = `${canvas.style.cssText}; opacity: ${getComputedStyle(canvases[k].closest(".layer") ?? canvases[k]).opacity}`;
    canvas.replaceWith(image);
  });
  const inputs = view.querySelectorAll("input");
  copy.querySelectorAll("input").forEach((input, k) => input.setAttribute("value", inputs[k].value));
  const selects = view.querySelectorAll("select");
  copy.querySelectorAll("select").forEach((select, k) => {
    [...select.options].forEach((each, at) => each.toggleAttribute("selected", at === selects[k].selectedIndex));
  });
  const style = document.createElement("style");
  style.textContent = document.querySelector("style")?.textContent ?? "";
  const body = document.createElement("div");
  body.className = "picture";
  body.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  if (document.documentElement.dataset.theme) body.dataset.theme = document.documentElement.dataset.theme;
  body.append(style, copy);
  const markup = new XMLSerializer().serializeToString(body).toWellFormed().replaceAll(FORBIDDEN, "\ufffd");
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(width)}" height="${Math.ceil(height)}">` +
    `<foreignObject width="100%" height="100%">${markup}</foreignObject></svg>`
  );
}
