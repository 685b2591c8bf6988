-- Relation maps: of this database, and the shared one.
vacuum full pg_class;
vacuum full pg_shseclabel;
reindex table pg_type;
reindex table pg_shdescription;
create table mapped(a int);
insert into mapped select generate_series(1, 100);
drop table mapped;
vacuum full pg_proc;
select pg_sleep(0.5);
