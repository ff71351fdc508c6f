"""The results of one library, as its models are checked."""

from tools.zoo.examples import Library
from tools.zoo.pool import Task
from tools.zoo.record import Record
from tools.zoo.results import LibraryResults, header_of, read_results, results_path
from tools.zoo.settings import Settings, select


class Run:
    """The results of one library, as they come."""

    def __init__(self, library: Library, settings: Settings) -> None:
        self.library = library
        self.settings = settings
        self.order = [*library.models, *library.skipped]
        self.chosen = select(self.order, settings)
        self.records = {record.name: record for record in self._kept()}
        for name in self.chosen:
            if name in library.skipped:
                self.records[name] = Record(name, "skipped", reason=library.skipped[name])
        self.tasks = [Task(library.name, name, settings.limits) for name in self.chosen if name not in self.records]

    def add(self, record: Record) -> None:
        """Note a record, and write the file anew."""
        self.records[record.name] = record
        self.write()

    def write(self) -> None:
        """Write the JSON file."""
        results = LibraryResults(header_of(self.library, self.settings.limits), [])
        results.with_records(self.records.values(), self.order).write(self.settings.out)

    def own_records(self) -> list[Record]:
        """Return the records of the models that were asked for, in order."""
        return [self.records[name] for name in self.chosen if name in self.records]

    def _kept(self) -> list[Record]:
        """Return the records of the file that stay: of models that were not asked for, and what passed before."""
        path = results_path(self.settings.out, self.library.name)
        before = read_results(path)
        if before is None or before.header != header_of(self.library, self.settings.limits):
            return []
        resumed = {r.name for r in before.records if self.settings.resume and r.status == "passed"}
        others = set(self.order).difference(self.chosen) if self.settings.is_partial else set()
        return [record for record in before.records if record.name in resumed | others]
