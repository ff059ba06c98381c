"""Configurations, where they differ and whole, and what the runs were made with."""

import json
from typing import Any

from dqrm.report.content import Section, Table, cell
from dqrm.report.records import Record, Subject, number, shown, table_of


def configuration(subject: Subject) -> Section:
    """The fields in which the runs differ, all fields, data and versions."""
    section = Section("Configuration and provenance")
    records = [each.first for each in subject.series]
    fields = list(dict.fromkeys(
        (section_, name) for record in records for section_, values in record.config.items() for name in values
    ))  # fmt: skip
    rows = [
        [f"{section_}.{name}", *(_value(record.config.get(section_, {}).get(name)) for record in records)]
        for section_, name in fields
    ]
    rows = [[shown(row[0]), *row[1:]] for row in rows]
    header = ["field", *subject.names]
    differing = [row for row in rows if len({*row[1:]}) > 1]
    if differing:
        section.tables.append(Table("Fields that differ", header, differing))
    elif len(records) > 1:
        section.text.append("All runs have the same configuration.")
    section.tables.append(Table("All fields", header, rows))
    section.tables.append(Table("Provenance", ["", *subject.names], _provenance(records)))
    if subject.study:
        section.text.append("Of each variant the first seed.")
    return section


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return shown(json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value)


def _provenance(records: list[Record]) -> list[list[str]]:
    def row(name: str, *values: Any) -> list[str]:
        return [name, *(shown("–" if value is None else value) for value in values)]

    versions = [table_of(record.info.get("versions") or record.summary.get("versions")) for record in records]
    packages = list(dict.fromkeys(name for each in versions for name in each))
    lists = [record.data.get("columns") for record in records]
    table_rows = [_total(each) for each in lists]
    return [
        row("run folder", *(record.path for record in records)),
        row("dataset", *(record.data.get("path") for record in records)),
        row("its fingerprint", *(str(record.data.get("fingerprint", "–"))[:16] for record in records)),
        row("training rows", *(_rows(record) for record in records)),
        row("table rows", *table_rows),
        row("starts from", *(table_of(record.info.get("start")).get("run") for record in records)),
        row("threads", *(record.info.get("threads") for record in records)),
        row("device", *(record.summary.get("device") for record in records)),
        row("steps", *(cell(record.figure("steps"), 0) for record in records)),
        row("training seconds", *(cell(record.figure("train_seconds"), 1) for record in records)),
        *(row(f"version of {shown(name)}", *(each.get(name) for each in versions)) for name in packages),
    ]


def _rows(record: Record) -> str:
    rows = table_of(record.data.get("rows")).get("train")
    return f"{rows:,}" if type(rows) is int else "–"


def _total(columns: Any) -> str:
    rows = [number(table_of(each).get("rows")) for each in columns] if isinstance(columns, list) else []
    return f"{sum(each or 0 for each in rows):,.0f}" if rows else "–"
