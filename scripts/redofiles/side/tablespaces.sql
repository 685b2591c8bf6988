-- Tablespaces and what moves between them.
create tablespace side_new location '';
create table moves(a int primary key, b text) tablespace side_new;
insert into moves select i, repeat('m', 100) from generate_series(1, 1000) i;
alter table moves set tablespace side_outside;
alter index moves_pkey set tablespace side_inside;
insert into side_placed select i, 'placed' from generate_series(1, 500) i;
begin;
alter table moves set tablespace side_inside;
truncate side_placed;
select pg_sleep(0.2);
rollback;
delete from side_placed;
drop table moves;
drop tablespace side_new;
select pg_sleep(0.5);
