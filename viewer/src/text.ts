// Numbers and tokens as a reader sees them.

/** Three significant digits with a sign; a dash where there is no number. */
export function signed(value: number | null | undefined): string {
  if (value == null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const digits = size >= 100 ? size.toFixed(0) : size === 0 ? "0" : size < 0.001 ? size.toExponential(1) : size.toPrecision(3);
  return (value < 0 ? "−" : value > 0 ? "+" : "") + digits;
}

export function plain(value: number | null | undefined, digits = 3): string {
  if (value == null || Number.isNaN(value)) return "–";
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

export const percent = (share: number | null | undefined): string =>
  share == null ? "–" : `${(100 * share).toFixed(Math.abs(share) < 0.0995 && share !== 0 ? 1 : 0)} %`.replace("-", "−");

export const probability = (p: number | null | undefined): string =>
  p == null ? "–" : p < 0.001 ? "< 0.001" : p.toFixed(3);

export function interval(low: number | null | undefined, high: number | null | undefined): string {
  return low == null || high == null ? "no interval" : `[${signed(low)}, ${signed(high)}]`;
}

/** A token with its line breaks and lonely spaces made visible. */
export function token(text: string): string {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return shown.trim() === "" ? "␣".repeat(Math.max(shown.length, 1)) : shown.trim();
}

export const cut = (text: string, length: number): string =>
  text.length <= length ? text : `${text.slice(0, length - 1).trimEnd()}…`;

export const count = (n: number, word: string): string => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
