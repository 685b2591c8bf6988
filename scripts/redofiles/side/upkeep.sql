-- Checkpoints, segments that end early, restore points, freezing.
\set name side_ :n
checkpoint;
select pg_sleep(2);
select pg_create_restore_point(:'name');
vacuum (freeze) mx;
select pg_sleep(1);
select pg_switch_wal();
vacuum (freeze) held;
select txid_current();
select pg_sleep(2);
