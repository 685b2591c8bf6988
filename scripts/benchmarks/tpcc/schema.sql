-- A mix of transactions like that of TPC-C, small enough to load in seconds: W warehouses, 10 districts each, customers,
-- stock, orders with their lines. Not TPC-C: no think times, no checks of its rules, fewer customers and items.
create table warehouse (w_id int primary key, w_name text, w_tax numeric(4, 4), w_ytd numeric(12, 2));
create table district (
  d_w_id int, d_id int, d_name text, d_tax numeric(4, 4), d_ytd numeric(12, 2), d_next_o_id int,
  primary key (d_w_id, d_id)
);
create table customer (
  c_w_id int, c_d_id int, c_id int, c_first text, c_last text, c_credit char(2), c_discount numeric(4, 4),
  c_balance numeric(12, 2), c_ytd_payment numeric(12, 2), c_payment_cnt int, c_data text,
  primary key (c_w_id, c_d_id, c_id)
);
create index customer_last on customer (c_w_id, c_d_id, c_last, c_first);
create table history (h_c_id int, h_c_d_id int, h_c_w_id int, h_date timestamptz, h_amount numeric(6, 2), h_data text);
create table item (i_id int primary key, i_name text, i_price numeric(5, 2), i_data text);
create table stock (
  s_w_id int, s_i_id int, s_quantity int, s_dist text, s_ytd int, s_order_cnt int, s_data text,
  primary key (s_w_id, s_i_id)
);
create table orders (
  o_w_id int, o_d_id int, o_id int, o_c_id int, o_entry_d timestamptz, o_carrier_id int, o_ol_cnt int,
  primary key (o_w_id, o_d_id, o_id)
);
create index orders_customer on orders (o_w_id, o_d_id, o_c_id, o_id);
create table new_order (no_w_id int, no_d_id int, no_o_id int, primary key (no_w_id, no_d_id, no_o_id));
create table order_line (
  ol_w_id int, ol_d_id int, ol_o_id int, ol_number int, ol_i_id int, ol_delivery_d timestamptz, ol_quantity int,
  ol_amount numeric(6, 2), ol_dist_info text,
  primary key (ol_w_id, ol_d_id, ol_o_id, ol_number)
);

insert into warehouse select w, 'warehouse ' || w, 0.1, 300000 from generate_series(1, :W) w;
insert into district select w, d, 'district ' || d, 0.1, 30000, 1 from generate_series(1, :W) w, generate_series(1, 10) d;
insert into customer
  select w, d, c, 'first ' || c, 'last ' || c % 100, case when c % 10 = 0 then 'BC' else 'GC' end, 0.05, -10, 10, 1,
    repeat(md5(c::text), 10)
  from generate_series(1, :W) w, generate_series(1, 10) d, generate_series(1, 300) c;
insert into item select i, 'item ' || i, 1 + i % 100, md5(i::text) from generate_series(1, 10000) i;
insert into stock
  select w, i, 10 + i % 90, md5(i::text), 0, 0, md5(w::text) from generate_series(1, :W) w, generate_series(1, 10000) i;

-- An order: its lines are five to fifteen random items of the stock.
create function place_order(w int, d int, c int) returns void language plpgsql as $$
declare
  o int; lines int := 5 + random() * 10; it int; price numeric; quantity int;
begin
  update district set d_next_o_id = d_next_o_id + 1 where d_w_id = w and d_id = d returning d_next_o_id - 1 into o;
  insert into orders values (w, d, o, c, now(), null, lines);
  insert into new_order values (w, d, o);
  for line in 1 .. lines loop
    it := 1 + random() * 9999;
    quantity := 1 + random() * 9;
    select i_price into price from item where i_id = it;
    update stock set s_quantity = case when s_quantity >= quantity + 10 then s_quantity - quantity else s_quantity + 91 - quantity end,
      s_ytd = s_ytd + quantity, s_order_cnt = s_order_cnt + 1 where s_w_id = w and s_i_id = it;
    insert into order_line values (w, d, o, line, it, null, quantity, quantity * price, md5(line::text));
  end loop;
  -- One in a hundred is called off.
  if random() < 0.01 then raise exception 'unused item' using errcode = 'TPC01'; end if;
exception when sqlstate 'TPC01' then null;
end $$;

create function pay(w int, d int, c int, amount numeric) returns void language plpgsql as $$
begin
  update warehouse set w_ytd = w_ytd + amount where w_id = w;
  update district set d_ytd = d_ytd + amount where d_w_id = w and d_id = d;
  update customer set c_balance = c_balance - amount, c_ytd_payment = c_ytd_payment + amount,
    c_payment_cnt = c_payment_cnt + 1,
    c_data = case when c_credit = 'BC' then left(c || ' ' || d || ' ' || w || ' ' || amount || c_data, 500) else c_data end
    where c_w_id = w and c_d_id = d and c_id = c;
  insert into history values (c, d, w, now(), amount, 'payment');
end $$;

-- The oldest order of each district that is not delivered.
create function deliver(w int, carrier int) returns void language plpgsql as $$
declare
  o int; c int; total numeric;
begin
  for d in 1 .. 10 loop
    delete from new_order where ctid = (
      select ctid from new_order where no_w_id = w and no_d_id = d order by no_o_id limit 1 for update skip locked
    ) returning no_o_id into o;
    continue when o is null;
    update orders set o_carrier_id = carrier where o_w_id = w and o_d_id = d and o_id = o returning o_c_id into c;
    update order_line set ol_delivery_d = now() where ol_w_id = w and ol_d_id = d and ol_o_id = o;
    select sum(ol_amount) into total from order_line where ol_w_id = w and ol_d_id = d and ol_o_id = o;
    update customer set c_balance = c_balance + coalesce(total, 0) where c_w_id = w and c_d_id = d and c_id = c;
  end loop;
end $$;
vacuum analyze;
