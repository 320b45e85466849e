// What a dictionary's folder says of a latent or meta-latent: contexts, density, logit lens; and where it acts here.
import { Chart, type Option } from "./charts";
import { data, GAP, type Evidence, type Where } from "./data";
import { Absent, Chips, Token, Tokens } from "./parts";
import { axis } from "./prompts";
import type { Go } from "./state";
import { percent, plain, token } from "./text";

/** The command that labels a site's dictionary, and with it a meta-dictionary. */
export function labelCommand(site: number, meta?: string): string {
  const folder = data.run.fidelity.find((each) => each.site === data.sites[site]?.name)?.folder ?? "DICTIONARY";
  return `mediation label ${folder} --model ${data.run.model} --text TEXT${meta ? ` --meta ${meta}` : ""}`;
}

export function Contexts({ found, command, what }: { found: Evidence | undefined; command: string; what: string }) {
  if (!found?.contexts?.length) {
    return <Absent command={command}>{found?.contexts ? `${what} was never on in the text it was labelled from.` : `There are no contexts from a corpus for ${what.toLowerCase()}.`}</Absent>;
  }
  const largest = Math.max(...found.contexts.flatMap((each) => each.values));
  return (
    <ol class="contexts">
      {found.contexts.map((each) => (
        <li>
          <span class="tokens">{each.tokens.map((text, k) => <>{k > 0 && GAP}<Token text={text} value={each.values[k]} largest={largest} marked={k === each.position} /></>)}</span>
          <small class="number">{plain(each.values[each.position])}</small>
        </li>
      ))}
    </ol>
  );
}

export function Histogram({ found, theme }: { found: Evidence | undefined; theme: string }) {
  if (!found?.histogram?.length) return null;
  const bins = found.histogram;
  return (
    <>
      <h4>Activations <small>on {percent(found.density)} of tokens</small></h4>
      <Chart
        height={120} theme={theme} label={`Histogram of activations in ${bins.length} bins, from ${plain(bins[0].from)} up`}
        option={(c): Option => ({
          grid: { left: 40, right: 8, top: 6, bottom: 22 },
          xAxis: { type: "category", data: bins.map((bin) => plain(bin.from, 2)), axisLabel: { color: c.soft, fontSize: 10, hideOverlap: true }, axisTick: { show: false }, axisLine: { lineStyle: { color: c.line } } },
          yAxis: axis(c),
          series: [{ type: "bar", data: bins.map((bin) => bin.count), barCategoryGap: "8%", itemStyle: { color: c.up }, silent: true }],
        })}
      />
    </>
  );
}

export function LogitLens({ found }: { found: Evidence | undefined }) {
  if (!found?.logits_up?.length) return null;
  return (
    <>
      <h4>Logit lens</h4>
      <p class="lens"><span class="soft">raises</span> <Chips words={found.logits_up} kind="up" /></p>
      <p class="lens"><span class="soft">lowers</span> <Chips words={found.logits_down ?? []} kind="down" /></p>
    </>
  );
}

/** The run's own prompts where something is largest. */
export function InPrompts({ where, go, unit }: { where: Where[]; go: Go; unit: string }) {
  if (!where.length) return <p class="soft">It is on in none of the prompts.</p>;
  const largest = Math.max(...where.flatMap((each) => each.value.map(Math.abs)));
  return (
    <ol class="contexts">
      {where.map((each) => {
        const values = data.prompts.tokens[each.at].map(() => 0);
        each.position.forEach((position, k) => (values[position] = each.value[k]));
        const best = each.value.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
        return (
          <li>
            <button type="button" class="plain" title={`Open the graph of ${data.prompts.id[each.at]}; largest at '${token(data.prompts.tokens[each.at][values.indexOf(best)] ?? "")}'`} onClick={() => go({ view: "graph", mode: data.own[each.at] ? "prompt" : "set", prompt: each.at, node: "" })}>
              <Tokens at={each.at} values={values} scale={largest} />
            </button>
            <small class="number" title={unit}>{plain(best)}</small>
          </li>
        );
      })}
    </ol>
  );
}
