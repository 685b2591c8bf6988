-- Databases, by both strategies and from another tablespace to the default one.
create database side_wal strategy wal_log;
create database side_copy template side_template strategy file_copy;
\c side_copy
create table in_copy as select i from generate_series(1, 1000) i;
vacuum full pg_class;
delete from in_copy where i > 500;
vacuum in_copy;
\c side
create database side_second template side_copy strategy file_copy tablespace side_inside;
select pg_sleep(0.5);
drop database side_copy;
\c side_second
create table more as select i from generate_series(1, 1000) i;
vacuum;
\c side
alter database side_second set tablespace pg_default;
select pg_sleep(0.3);
drop database side_wal;
drop database side_second;
select pg_sleep(0.5);
