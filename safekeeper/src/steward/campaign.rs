//! An election with members that are being changed, where no compute does it: it writes nothing, and what was there before is
//! committed once a majority of both groups has followed it.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use pgstrata_ids::{Lsn, Member, Term, TimelineParameters};
use pgstrata_listen::Security;
use pgstrata_quorum::{Append, Configuration, Proposer, ProposerId, ProposerOutput};
use pgstrata_wal_client::SafekeeperClient;
use pgstrata_wire::safekeeper::Greeting;

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// WAL sent at once, in bytes.
const PIECE: u64 = 1 << 20;

/// Most that is sent to one member, in bytes: what is missing beyond is committed, and is caught up with otherwise.
const MOST: u64 = 64 << 20;

/// Takes the very next term: a compute that starts meanwhile asks for a much later one, and outranks this.
pub fn run(
    configuration: &Configuration,
    parameters: &TimelineParameters,
    places: &[(Member, String)],
    security: &Security,
) -> io::Result<()> {
    let id = ProposerId(rand::random());
    let mut proposer = Proposer::new(id, configuration.clone(), Term(1));
    let mut outputs = Vec::new();
    let mut clients = Vec::new();
    let greeting = Greeting {
        parameters: parameters.clone(),
        known: configuration.number(),
        addresses: Vec::new(),
        proposer: id,
    };
    for (member, address) in places {
        let connected = connect(*member, address, security).and_then(|mut client| {
            let reply = client.greet(&greeting)?;
            let answered = Member { node: reply.node, incarnation: reply.incarnation };
            let same = answered == *member
                && reply.configuration.as_ref().is_some_and(|said| said == configuration);
            match same {
                true => Ok((client, reply.term)),
                false => Err(io::Error::other("it is another member, or knows others")),
            }
        });
        match connected {
            Ok((client, term)) => {
                clients.push((*member, client));
                proposer.connected(*member, term, &mut outputs);
            }
            Err(error) => {
                tracing::info!(node = %member.node, %error, "takes no part in an election")
            }
        }
    }
    let mut log = None;
    let mut queue: VecDeque<ProposerOutput> = outputs.drain(..).collect();
    while let Some(output) = queue.pop_front() {
        match output {
            ProposerOutput::RequestVote(member, request) => {
                let Some(client) = client_of(&mut clients, member) else { continue };
                match client.vote(&request) {
                    Ok(vote) => proposer.vote(member, vote, &mut outputs),
                    Err(error) => tracing::info!(node = %member.node, %error, "gave no vote"),
                }
            }
            ProposerOutput::AnnounceElected(member, elected) => {
                let Some(client) = client_of(&mut clients, member) else { continue };
                match client.elected(&elected) {
                    Ok(ack) => proposer.ack(member, ack, &mut outputs),
                    Err(error) => tracing::info!(node = %member.node, %error, "follows nobody"),
                }
            }
            ProposerOutput::Elected(election) => log = Some(election),
            ProposerOutput::StreamFrom(member, from) => {
                let Some(election) = &log else { continue };
                let missing = election.start_lsn.0.saturating_sub(from.0);
                let (Some(client), true) =
                    (client_of(&mut clients, member), (1..=MOST).contains(&missing))
                else {
                    continue;
                };
                let donor = places.iter().find(|(other, _)| *other == election.donor);
                let Some((donor, address)) = donor else { continue };
                let mut reader = connect(*donor, address, security)?;
                reader.open(parameters.tenant, parameters.timeline)?;
                let (mut at, term) = (from, election.term);
                while at < election.start_lsn {
                    let mut bytes = Vec::new();
                    let to = election.start_lsn.min(at + PIECE);
                    reader.read_wal(at, to, term, &mut bytes)?;
                    if bytes.is_empty() {
                        return Err(io::Error::other(format!(
                            "no WAL at {at} from {}",
                            donor.node
                        )));
                    }
                    let length = bytes.len() as u64;
                    let commit_lsn = election.commit_lsn;
                    let record_end = Lsn::INVALID;
                    let append = Append { term, start: at, length, record_end, commit_lsn };
                    let ack = client.append(append, &bytes)?;
                    proposer.ack(member, ack, &mut outputs);
                    at = at + length;
                }
            }
            ProposerOutput::Committed(_) => {}
            ProposerOutput::Fenced(term) => {
                return Err(io::Error::other(format!("a compute has won term {term} meanwhile")));
            }
        }
        queue.extend(outputs.drain(..));
    }
    let Some(election) = log else {
        return Err(io::Error::other("no majority of both groups has answered"));
    };
    for (_, client) in &mut clients {
        let (term, commit_lsn) = (election.term, proposer.commit_lsn());
        let start = election.start_lsn;
        let append = Append { term, start, length: 0, record_end: Lsn::INVALID, commit_lsn };
        // It is committed whether or not everybody hears of it.
        let _ = client.append(append, &[]);
    }
    tracing::info!(timeline = %parameters.timeline, term = %election.term, "elected to change members");
    Ok(())
}

fn client_of(
    clients: &mut [(Member, SafekeeperClient)],
    member: Member,
) -> Option<&mut SafekeeperClient> {
    let client = clients.iter_mut().find(|(other, _)| *other == member);
    client.map(|(_, client)| client)
}

fn connect(member: Member, address: &str, security: &Security) -> io::Result<SafekeeperClient> {
    SafekeeperClient::connect(address, Some(member.node), security.identity(), PATIENCE)
}
