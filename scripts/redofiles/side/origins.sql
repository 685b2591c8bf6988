-- Replication origins and their progress: by transactions that commit, are prepared or roll back, and set forward and back.
\set name side_ :n
\set gid side_origin_ :n
select pg_replication_origin_create(:'name');
select pg_replication_origin_session_setup(:'name');
begin;
select pg_replication_origin_xact_setup(('0/' || to_hex(10000 + :n))::pg_lsn, now());
insert into held values (:n, 'from elsewhere');
commit;
begin;
select pg_replication_origin_xact_setup(('0/' || to_hex(20000 + :n))::pg_lsn, now());
insert into held values (:n, 'prepared elsewhere');
prepare transaction :'gid';
select pg_sleep(0.2);
commit prepared :'gid';
-- Less far: stays where it is.
begin;
select pg_replication_origin_xact_setup('0/10', now());
insert into held values (:n, 'from before');
commit;
select pg_replication_origin_session_reset();
-- Back, because it is told so.
select pg_replication_origin_advance(:'name', '0/FF');
select pg_sleep(0.2);
select pg_replication_origin_advance(:'name', ('1/' || to_hex(:n))::pg_lsn);
select pg_replication_origin_drop('side_' || (:n - 3));
select pg_sleep(0.2);
