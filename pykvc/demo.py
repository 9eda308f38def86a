"""`pykvc demo`: one prompt of many shots, the whole cache against a quarter of it.

The shots are questions and answers about countries, composed from a table in an order that a fixed seed decides; the
question asks about a country that is not among them. Every row evaluates the prompt afresh, then evicts, then
answers: nothing is carried from one row to the next, and what the table says of a policy holds for its whole run.
"""
import random
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from .generation import Generation
from .llm import LLM
from .table import mebibytes

BUDGET = 0.25
N_CELLS = 1280
ROWS: dict[str, dict[str, Any]] = {
    "full": {}, **{policy: dict(kv_policy=policy, kv_budget=BUDGET) for policy in ("shotkv", "snapkv", "streaming_llm")},
    f"snapkv, {N_CELLS} cells": dict(kv_policy="snapkv", kv_cells=N_CELLS)}
ASKED = ("Italy", "Rome", "Europe")

COUNTRIES = {
    "Europe": "France Paris, Germany Berlin, Spain Madrid, Portugal Lisbon, Austria Vienna, Norway Oslo, Sweden Stockholm, "
              "Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Greece Athens, Poland Warsaw, Hungary Budapest, "
              "Romania Bucharest, Bulgaria Sofia, Belgium Brussels, Iceland Reykjavik, Croatia Zagreb, Serbia Belgrade, "
              "Latvia Riga, Estonia Tallinn, Lithuania Vilnius, Ukraine Kyiv, Albania Tirana",
    "Asia": "Japan Tokyo, China Beijing, India Delhi, Thailand Bangkok, Vietnam Hanoi, Iran Tehran, Iraq Baghdad, "
            "Jordan Amman, Nepal Kathmandu, Pakistan Islamabad, Bangladesh Dhaka, Afghanistan Kabul, Syria Damascus, "
            "Lebanon Beirut, Qatar Doha, Indonesia Jakarta, Mongolia Ulaanbaatar, Cambodia Phnom Penh",
    "Africa": "Egypt Cairo, Kenya Nairobi, Ghana Accra, Nigeria Abuja, Morocco Rabat, Tunisia Tunis, Algeria Algiers, "
              "Libya Tripoli, Sudan Khartoum, Ethiopia Addis Ababa, Uganda Kampala, Senegal Dakar, Mali Bamako, "
              "Angola Luanda, Zambia Lusaka, Zimbabwe Harare, Rwanda Kigali, Somalia Mogadishu, Namibia Windhoek",
    "South America": "Peru Lima, Chile Santiago, Argentina Buenos Aires, Brazil Brasilia, Colombia Bogota, Ecuador Quito, "
                     "Uruguay Montevideo, Venezuela Caracas, Paraguay Asuncion, Guyana Georgetown",
    "North America": "Canada Ottawa, Cuba Havana, Jamaica Kingston, Panama Panama City, Honduras Tegucigalpa, "
                     "Nicaragua Managua, Guatemala Guatemala City, Haiti Port-au-Prince",
}


def ask(country: str) -> str:
    return f"Q: What is the capital of {country}, and on which continent does it lie?\nA:"


def tell(country: str, capital: str, continent: str) -> str:
    return f" The capital of {country} is {capital}, and {country} lies in {continent}."


def compose(seed: int = 0) -> tuple[list[str], str, str]:
    """(shots, question, the right answer). The same for the same seed, everywhere."""
    facts = [(*entry.split(" ", 1), continent) for continent, entries in COUNTRIES.items() for entry in entries.split(", ")]
    random.Random(seed).shuffle(facts)
    shots = [f"{ask(country)}{tell(country, capital, continent)}\n\n" for country, capital, continent in facts]
    return shots, ask(ASKED[0]), tell(*ASKED).strip()


def run(model: str | None = None, n_threads: int | None = None, console: Console | None = None) -> list[Generation]:
    """Prints the table and returns its rows, in the order of ROWS."""
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    shots, question, right = compose()
    rows = []
    for name, how in ROWS.items():
        with LLM(model, n_ctx=4096, n_threads=n_threads, **how) as llm:
            n_tokens = len(llm.tokenize("".join(shots) + question))
            with console.status(f"{name}: {len(shots)} shots, {n_tokens} tokens"):
                rows.append(llm.generate(shots=shots, question=question, max_tokens=32, stop="\n"))

    table = Table("policy", "cells kept", "KV allocated", "KV used", "prefill t/s", "decode t/s", "evict ms", "answer", box=None, pad_edge=False)
    for column in table.columns[1:7]:
        column.justify = "right"
    for name, row in zip(ROWS, rows):
        table.add_row(name, f"{sum(row.kv['kept'])/len(row.kv['kept']):.0f}", mebibytes(row.kv["bytes_allocated"]),
                      mebibytes(row.kv["bytes_used"]), f"{row.timings['prefill_tps']:.0f}", f"{row.timings['decode_tps']:.1f}",
                      f"{row.timings['evict_ms']:.0f}", row.text.strip())
    console.print(f"\n{len(shots)} shots, {rows[0].n_prompt} tokens; evicted to {BUDGET:.0%} when the whole prompt was evaluated (question-in); "
                  f"in {N_CELLS} cells whenever they were full\n")
    console.print(table, highlight=False)
    console.print(f"\nRight is: {right}\nAllocated is what n_ctx takes, 4096 cells, unless kv_cells says less; used is what holds tokens.",
                  highlight=False)
    return rows
