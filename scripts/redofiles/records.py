"""The records of a run: which moments to look at, and what was going on then."""

import array
import bisect
import collections

from .replication import lsn_number, lsn_text

# Resource managers whose effects no page image shows.
OUTSIDE = ("CLOG", "CommitTs", "Database", "MultiXact", "RelMap", "ReplicationOrigin", "Storage", "Tablespace")
OUTSIDE_KINDS = (
    "Transaction/PREPARE", "Transaction/COMMIT_PREPARED", "Transaction/ABORT_PREPARED", "Transaction/ABORT",
    "Transaction/COMMIT", "XLOG/CHECKPOINT_ONLINE", "XLOG/CHECKPOINT_SHUTDOWN", "XLOG/NEXTOID", "XLOG/SWITCH",
    "Heap2/VISIBLE",
)
# Records whose ends are moments that the page server knows.
NOTED = ("Transaction/COMMIT", "Transaction/COMMIT_PREPARED", "Transaction/PREPARE", "XLOG/RESTORE_POINT")
# Records of one kind that are looked at to find one whose transaction goes on.
TRIES = 20


class Records:
    def __init__(self, cluster, wal, first, end):
        self.lsns, self.xids, self.kinds = array.array("Q"), array.array("I"), array.array("H")
        self.names, numbers = [], {}
        dump = cluster.dump(wal)
        for line in dump.stdout:
            # LSN prev LSN KIND xid XID ...
            parts = line.split(" ", 6)
            number = numbers.get(parts[3])
            if number is None:
                number = numbers[parts[3]] = len(self.names)
                self.names.append(parts[3])
            self.lsns.append(lsn_number(parts[0]))
            self.xids.append(int(parts[5]))
            self.kinds.append(number)
        dump.wait()
        self.first, self.end = bisect.bisect_left(self.lsns, first), bisect.bisect_left(self.lsns, end)
        # A transaction's last record is its end; a subtransaction's is at or before that.
        self.spans = {}
        for index, xid in enumerate(self.xids):
            if xid:
                begin, _ = self.spans.get(xid, (index, index))
                self.spans[xid] = (begin, index)

    def __len__(self):
        return self.end - self.first

    def lsn(self, index):
        return lsn_text(self.lsns[index])

    def kind(self, index):
        return self.names[self.kinds[index]]

    def in_progress(self, index):
        """How many transactions and subtransactions have written something before this record, and write later."""
        return sum(begin < index <= end for begin, end in self.spans.values())

    def is_outside(self, index):
        kind = self.kind(index)
        return kind in OUTSIDE_KINDS or kind.split("/")[0] in OUTSIDE

    def by_record(self, lsn):
        """Counts of the run's records by kind, up to the last moment that is compared."""
        counts = collections.Counter(self.kinds[self.first:self.index(lsn)])
        return {self.names[number]: count for number, count in counts.items()}

    def index(self, lsn):
        """The first record that starts there or later."""
        return bisect.bisect_left(self.lsns, lsn_number(lsn))

    def noted_after(self, index):
        """The first moment behind this record that the page server knows for sure, as the record that starts there."""
        while index < self.end and self.kind(index) not in NOTED:
            index += 1
        return index + 1

    def choose(self, count, source):
        """One record of each of `count` equal parts: any, or one that comes after a record without an image. Of these,
        rare kinds are as likely as frequent ones."""
        for part in range(count):
            low = self.first + 1 + part * (len(self) - 1) // count
            high = self.first + 1 + (part + 1) * (len(self) - 1) // count
            if low >= high:
                continue
            by_kind = collections.defaultdict(list)
            if part % 2:
                for index in range(low, high):
                    if self.is_outside(index):
                        by_kind[self.kind(index)].append(index)
            if not by_kind:
                yield source.randrange(low, high)
                continue
            moments = []
            for record in source.sample(found := by_kind[source.choice(sorted(by_kind))], min(TRIES, len(found))):
                moment = self.noted_after(record)
                goes_on = self.xids[record] and self.spans[self.xids[record]][1] >= moment
                moments.append((not goes_on, moment))
            yield min(moments)[1]
