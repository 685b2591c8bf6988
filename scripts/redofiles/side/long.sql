-- Some transaction is always in progress, with subtransactions more than shared memory remembers.
begin;
call nested(40);
create table long_:n(a int primary key);
insert into long_:n select generate_series(1, 500);
savepoint s;
create table longer_:n as select * from long_:n;
select pg_sleep(1.5);
release s;
drop table long_:n;
select pg_sleep(0.5);
select :n % 3 = 0 as undo \gset
\if :undo
rollback;
\else
commit;
drop table longer_:n;
\endif
truncate held;
