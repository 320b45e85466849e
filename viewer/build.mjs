// Bundles the page's script and style into circuits/viewer/dist, with the licences of what is in the bundle.
// The same sources and lock file give the same bytes.
import { build } from "esbuild";
import { readFileSync, writeFileSync } from "node:fs";

const out = process.argv[2] ?? "../circuits/viewer/dist";
const options = { bundle: true, minify: true, charset: "utf8", legalComments: "none", logLevel: "warning" };
const result = await build({
  ...options,
  entryPoints: ["src/main.tsx"],
  outfile: `${out}/page.js`,
  format: "iife",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  metafile: true,
});
await build({ ...options, entryPoints: ["src/style.css"], outfile: `${out}/page.css` });

const used = new Set(Object.keys(result.metafile.inputs).flatMap((file) => /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(file)?.[1] ?? []));
const texts = [...used].sort().map((name) => {
  const about = JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8"));
  const files = { tslib: ["LICENSE.txt"], echarts: ["LICENSE", "NOTICE"] }[name] ?? ["LICENSE"];
  return [`${name} ${about.version}, ${about.license}`, ...files.map((file) => readFileSync(`node_modules/${name}/${file}`, "utf8").trim())].join("\n\n");
});
writeFileSync(`${out}/LICENSES.txt`, `page.js holds parts of these packages.\n\n${texts.join(`\n\n${"-".repeat(100)}\n\n`)}\n`);
