// Small pieces that several views share.
import type { ComponentChildren } from "preact";
import { useState } from "preact/hooks";
import { data, GAP } from "./data";
import { percent, signed, token } from "./text";

export function Figure({ name, children, hint }: { name: string; children: ComponentChildren; hint?: string }) {
  return (
    <div class="figure" title={hint}>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

/** What is not in a run, in words, with the command that makes it. */
export function Absent({ children, command }: { children: ComponentChildren; command?: string }) {
  return (
    <p class="absent">
      {children}
      {command && (
        <>
          {" "}
          Make it with <code>{command}</code>.
        </>
      )}
    </p>
  );
}

/** A bar from zero: in the middle, or where nothing is negative on the left. */
export function Bar({ value, scale, positive }: { value: number | null; scale: number; positive?: boolean }) {
  if (value == null) return <span class="bar" />;
  const size = scale ? Math.abs(value) / scale : 0;
  const [zero, room] = positive ? [0, 100] : [50, 50];
  return (
    <span class={positive ? "bar positive" : "bar"} aria-hidden="true">
      <i class={value > 0 ? "up" : "down"} style={{ left: `${value < 0 ? zero - room * size : zero}%`, width: `${room * size}%` }} />
    </span>
  );
}

export const Meter = ({ share }: { share: number }) => (
  <span class="meter">
    <i style={{ width: `${100 * Math.min(1, Math.max(0, share))}%` }} />
    <span>{percent(share)}</span>
  </span>
);

/** A prompt's tokens, each as dark as its value is large; blue pushes up, orange down. */
export function Tokens({ at, values, scale, mark }: { at: number; values?: ArrayLike<number>; scale?: number; mark?: number }) {
  const largest = scale ?? Math.max(1e-12, ...Array.from(values ?? [], (value) => Math.abs(value)));
  return (
    <span class="tokens">
      {data.prompts.tokens[at].map((text, k) => (
        <>
          {k > 0 && GAP}
          <Token text={text} value={values?.[k] ?? 0} largest={largest} marked={k === mark} />
        </>
      ))}
    </span>
  );
}

export function Token({ text, value, largest, marked }: { text: string; value: number; largest: number; marked?: boolean }) {
  const share = Math.min(1, Math.abs(value) / largest);
  const background = share < 0.02 ? "transparent" : `color-mix(in srgb, var(--${value > 0 ? "up" : "down"}) ${Math.round(12 + 58 * share)}%, transparent)`;
  return (
    <span class={marked ? "token marked" : "token"} title={value ? `${token(text)}: ${signed(value)}` : undefined} style={{ background }}>
      {text.replaceAll("\n", "↵")}
    </span>
  );
}

export interface Column<T> {
  title: string;
  key: string;
  cell: (row: T) => ComponentChildren;
  value: (row: T) => string | number | null; // sorts, and goes into the CSV
  number?: boolean;
  hint?: string;
}

const PAGE = 100; // rows drawn at once

/** A table that sorts by its headings; `sort` is "key" or "-key". */
export function Table<T>(props: {
  rows: T[];
  columns: Column<T>[];
  sort: string;
  onSort: (sort: string) => void;
  onPick?: (row: T) => void;
  picked?: (row: T) => boolean;
  caption: string;
}) {
  const { columns, sort, onSort, onPick } = props;
  const [page, setPage] = useState(1);
  const rows = sorted(props.rows, columns, sort);
  const key = sort.replace(/^-/, "");
  return (
    <div class="scroll">
      <table>
        <caption class="hidden">{props.caption}</caption>
        <thead>
          <tr>
            {columns.map((column) => {
              const here = column.key === key;
              const order = here ? (sort.startsWith("-") ? "descending" : "ascending") : undefined;
              return (
                <th scope="col" class={column.number ? "number" : ""} aria-sort={order} title={column.hint}>
                  <button type="button" onClick={() => onSort(here && !sort.startsWith("-") ? `-${column.key}` : here ? column.key : column.number ? `-${column.key}` : column.key)}>
                    {column.title}
                    <span aria-hidden="true">{here ? (sort.startsWith("-") ? " ▾" : " ▴") : ""}</span>
                  </button>
                </th>
              );
            })}
          </tr>
        </thead>
        <tbody>
          {rows.slice(0, page * PAGE).map((row) => (
            <tr
              class={props.picked?.(row) ? "picked" : ""}
              tabIndex={onPick ? 0 : undefined}
              onClick={onPick && (() => onPick(row))}
              onKeyDown={onPick && ((event) => event.key === "Enter" && event.target === event.currentTarget && onPick(row))}
            >
              {columns.map((column) => (
                <td class={column.number ? "number" : ""}>{column.cell(row)}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
      {rows.length > page * PAGE && (
        <button type="button" class="more" onClick={() => setPage(page + 1)}>
          Show {Math.min(PAGE, rows.length - page * PAGE)} more of {rows.length}
        </button>
      )}
    </div>
  );
}

export function sorted<T>(rows: T[], columns: Column<T>[], sort: string): T[] {
  const by = columns.find((column) => column.key === sort.replace(/^-/, ""));
  if (!by) return rows;
  const turn = sort.startsWith("-") ? -1 : 1;
  return [...rows].sort((a, b) => {
    const [x, y] = [by.value(a), by.value(b)];
    if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1; // what is absent comes last
    return turn * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

export const Chips = ({ words, kind }: { words: string[]; kind: string }) => (
  <span class="chips">
    {words.map((word) => (
      <span class={`chip ${kind}`}>{token(word)}</span>
    ))}
  </span>
);
