-- Four transactions stay prepared; of every pair, the older one commits and the newer one rolls back.
select :n - 4 as old, ((:n - 4) % 2) as odd \gset
\set gid side_ :n
\set old_gid side_ :old
\set drop_gid side_drop_ :n
begin;
create table prepared_:n(a int primary key, b text);
insert into prepared_:n select i, repeat('p', i) from generate_series(1, 200) i;
savepoint one;
insert into held values (:n, 'kept');
savepoint two;
insert into held values (:n, 'undone');
rollback to two;
release one;
select count(*) from (select * from mx for key share) s;
prepare transaction :'gid';
select pg_sleep(0.1);
\if :odd
rollback prepared :'old_gid';
\else
commit prepared :'old_gid';
-- What it made is dropped in the same way.
begin;
drop table prepared_:old;
prepare transaction :'drop_gid';
select pg_sleep(0.3);
commit prepared :'drop_gid';
\endif
select pg_sleep(0.2);
