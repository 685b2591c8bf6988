//! Seeded faults: disks and networks that fail on command.
