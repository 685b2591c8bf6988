-- What the loops beside a suite work on. :'location' is a directory for a tablespace.
create table held(a int, b text);
create table mx(id int primary key, v int);
insert into mx select i, 0 from generate_series(1, 5) i;
create sequence counter;
create table shrinks(a int, b text);
create table mapped(a int primary key);
create tablespace side_inside location '';
create tablespace side_outside location :'location';
create table side_placed(a int primary key, b text) tablespace side_outside;
create procedure nested(depth int) language plpgsql as $$ begin
  insert into held values (depth, 'nested');
  if depth > 0 then
    begin
      call nested(depth - 1);
      if depth % 7 = 3 then raise exception 'undone'; end if;
    exception when raise_exception then null;
    end;
  end if;
end $$;
create database side_template;
